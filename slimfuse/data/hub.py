"""Any data set the `datasets` library reads: image folders, hub names, local folders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimfuse.data.base import Image, ImageData, Split
from slimfuse.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Column(Sequence[Image]):
    """The image column of a `datasets.Dataset`, decoded to RGB one image at a time."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Image:  # type: ignore[override]
        return np.asarray(self.dataset[i][self.column].convert("RGB"), dtype=np.uint8)


def load_hub(
    path: str,
    *,
    config: str | None = None,
    folder: bool = False,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str = "image",
    label_column: str = "label",
    image_size: int = 224,
) -> ImageData:
    """Return an image classification data set from a hub name, a local folder or an image folder.

    `folder=True` reads `path` as an image folder (one subfolder a class under each split). No
    code from the data set is run. Raises DataError with the columns and splits that exist.
    """
    import datasets

    where = f"data.path {path}"
    if folder and not Path(path).is_dir():
        raise DataError("the image folder does not exist", where=where, got=path)
    try:
        with _quiet():
            loaded = (
                datasets.load_dataset("imagefolder", data_dir=str(Path(path).resolve()))
                if folder
                else datasets.load_dataset(path, config)
            )
    except Exception as error:
        raise DataError(
            "the data set could not be loaded",
            where=where,
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            hint="give a folder on this machine, or a hub name while online",
        ) from error
    missing = [s for s in (train_split, test_split) if s not in loaded]
    if missing:
        raise DataError(
            f"split {missing[0]!r} does not exist",
            where=where,
            allowed=", ".join(loaded),
            hint="set data.train_split and data.test_split",
        )
    features = loaded[train_split].features
    for column, key in ((image_column, "image_column"), (label_column, "label_column")):
        if column not in features:
            raise DataError(
                f"column {column!r} does not exist",
                where=where,
                allowed=", ".join(features),
                hint=f"set data.{key}",
            )
    names = getattr(features[label_column], "names", None)
    if names is None:
        raise DataError(
            f"column {label_column!r} is not a class label",
            where=where,
            got=str(features[label_column]),
            hint="cast it with datasets' ClassLabel, or use an image folder",
        )
    if loaded[test_split].features[label_column].names != names:
        raise DataError("the splits have different classes", where=where)
    train, test = (
        Split(Column(part, image_column), np.asarray(part[label_column], dtype=np.int64))
        for part in (loaded[train_split], loaded[test_split])
    )
    for name, split in ((train_split, train), (test_split, test)):
        if len(split) == 0 or split.labels.min() < 0:
            raise DataError(f"split {name!r} is empty or has unlabelled rows", where=where)
    marks = ":".join(loaded[s]._fingerprint for s in (train_split, test_split))
    return ImageData(
        name=Path(path).name if folder else path,
        train=train,
        test=test,
        classes=tuple(names),
        image_size=image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        fingerprint=hashlib.sha256(marks.encode() + train.labels.tobytes()).hexdigest(),
    )


class _quiet:
    """Silence the library's own bars; ours tell what is going on."""

    def __enter__(self) -> None:
        import datasets

        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        import datasets

        datasets.enable_progress_bars()
