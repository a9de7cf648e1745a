"""Any data set the `datasets` library reads: image folders, hub names, local folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse.data.base import Image, ImageData, Split, no_labels
from slimfuse.data.tables import Rows
from slimfuse.errors import DataError, first_line
from slimfuse.progress import track

SHOWN = 6
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
    labels: bool = True,
) -> ImageData:
    """Return images from a hub name, a local folder or an image folder, labels: of one class each.

    `folder=True` reads `path` as an image folder: under each split one subfolder a class, or,
    without labels, images anywhere. No code from the data set is run. Raises DataError with the
    columns and splits that exist.
    """
    if folder and not Path(path).is_dir():
        raise DataError("the image folder does not exist", where=f"data.path {path}", got=path)

    def load() -> Any:
        import datasets

        if folder:
            return datasets.load_dataset("imagefolder", data_dir=str(Path(path).resolve()))
        return datasets.load_dataset(path, config)

    columns = [("image_column", image_column)]
    if labels:
        columns.append(("label_column", label_column))
    splits = (train_split, test_split)
    parts = open_splits(path, load, splits, columns)
    if labels and not folder:
        check_names(path, config, splits, label_column)
    names = class_names(parts, label_column, path) if labels else ()
    if names is None:
        raise DataError(
            f"column {label_column!r} is not a class label",
            where=f"data.label_column of {path}",
            got=str(parts[0].features[label_column]),
            hint="cast it with datasets' ClassLabel, or use an image folder",
        )
    train, test = (
        Split(
            Column(part, image_column),
            np.asarray(part[label_column], np.int64) if labels else no_labels(len(part)),
        )
        for part in parts
    )
    check_labels([Rows(split, path) for split in splits], (train.labels, test.labels))
    local = Path(path) if Path(path).exists() else None
    return ImageData(
        name=name_of(path),
        train=train,
        test=test,
        classes=names,
        image_size=image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        fingerprint=_fingerprint(
            dict(zip(splits, parts, strict=True)),
            image_column,
            label_column if labels else None,
            local,
        ),
        kind="single" if labels else "none",
    )


def open_splits(
    path: str, load: Callable[[], Any], splits: Sequence[str], columns: Sequence[tuple[str, str]]
) -> list[Any]:
    """Return the named splits of what `load` makes with `datasets`.

    path: the recipe's data.path; splits: the training split, then the test split; columns: those
    needed, each with its key in the recipe. Raises DataError with the splits and columns that
    exist.
    """
    try:
        with _quiet():
            loaded = load()
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            "the data set could not be loaded",
            where=f"data.path {path}",
            got=first_line(error),
            hint="give a folder on this machine, or a hub name while online",
        ) from error
    for part, key in zip(splits, ("train_split", "test_split"), strict=True):
        if part not in loaded:
            raise DataError(
                f"split {part!r} does not exist",
                where=f"data.{key} of {path}",
                allowed=", ".join(loaded),
                hint="set data.train_split and data.test_split",
            )
        features = loaded[part].features
        for name, column in columns:
            if column not in features:
                raise DataError(
                    f"column {column!r} does not exist",
                    where=f"data.{name} of {path}",
                    allowed=", ".join(features),
                    hint=f"set data.{name}",
                )
    return [loaded[part] for part in splits]


def class_names(parts: Sequence[Any], column: str, path: str) -> tuple[str, ...] | None:
    """Return the classes of a column of class labels, None where its type has no names."""
    names, *others = (getattr(part.features[column], "names", None) for part in parts)
    if any(other != names for other in others):
        raise DataError("the splits have different classes", where=f"data.path {path}")
    return None if names is None else tuple(names)


def check_names(path: str, config: str | None, splits: Sequence[str], column: str) -> None:
    """Raise DataError where local parquet files name the classes of a column differently.

    The library reads every file with the first one's names, so those of another would be taken
    for other classes.
    """
    if not Path(path).is_dir():
        return
    import datasets
    import pyarrow.parquet

    files = datasets.load_dataset_builder(path, config).config.data_files or {}
    first: tuple[str, list[str]] | None = None
    for split in splits:
        for file in files.get(split, ()):
            if not file.endswith(".parquet") or not Path(file).is_file():
                continue
            features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
            feature = features.get(column)
            names = getattr(getattr(feature, "feature", feature), "names", None)
            if names is None:
                continue
            first = first or (Path(file).name, names)
            if names != first[1]:
                other = f"{Path(file).name} {', '.join(names[:SHOWN])}"
                raise DataError(
                    "the files name the classes differently",
                    where=f"data.label_column of {path}",
                    got=f"{first[0]} has {', '.join(first[1][:SHOWN])}; {other}",
                    hint="write all splits with one ClassLabel",
                )


def check_labels(splits: Sequence[Rows], labels: Sequence[NDArray[np.int64]]) -> None:
    """Raise DataError where a split has no rows, or one without a class (below 0)."""
    for rows, of_split in zip(splits, labels, strict=True):
        rows.need_some(len(of_split))
        bare = np.flatnonzero(of_split < 0)
        if len(bare):
            raise DataError(
                f"split {rows.split!r} has rows without a label",
                where=rows.place(int(bare[0])),
                got=f"{len(bare)} of {len(of_split)} rows, this one first",
                allowed="a label in every row",
                hint="label them or leave them out; tasks such as sentence-embedding need none",
            )


def name_of(path: str) -> str:
    """Return a hub's name as it is, and of a local path the last part."""
    return Path(path).resolve().name if Path(path).exists() else path


def _fingerprint(
    parts: Mapping[str, Any], image_column: str, label_column: str | None, root: Path | None
) -> str:
    """Return a sha256 of two splits: of the encoded images, their names and labels below `root`.

    Without `root`, on a hub, it is made of the library's own marks of the splits.
    """
    import datasets

    digest = hashlib.sha256()
    for split, part in parts.items():
        names = None if label_column is None else part.features[label_column].names
        digest.update(f"{split}: {names}\n".encode())
        if root is None:
            digest.update(part._fingerprint.encode())
            continue
        raw = part.cast_column(image_column, datasets.Image(decode=False))
        with track(f"reading {split} images", len(raw)) as tell:
            kept = [column for column in (image_column, label_column) if column is not None]
            for i, row in enumerate(raw.select_columns(kept)):
                name, sha256 = _encoded(row[image_column], root.resolve())
                label = None if label_column is None else row[label_column]
                digest.update(f"{name}\0{label}\0{sha256}\n".encode())
                tell(i + 1)
    return digest.hexdigest()


def _encoded(image: Mapping[str, Any], root: Path) -> tuple[str, str]:
    """Return an image's name below `root` and the sha256 of its undecoded bytes."""
    path = Path(image["path"] or "")
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    if image["bytes"] is not None:
        return name, hashlib.sha256(image["bytes"]).hexdigest()
    try:
        with path.open("rb") as file:
            return name, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("an image can't be read", where=str(path), got=first_line(error)) from error


class _quiet:
    """Silence the library's own bars; ours tell what is going on."""

    def __enter__(self) -> None:
        import datasets

        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        import datasets

        datasets.enable_progress_bars()
