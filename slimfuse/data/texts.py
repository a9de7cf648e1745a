"""Text classification data: tables of a hub, of a local folder, or CSV and JSON Lines files."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse.data.base import Split, TextData
from slimfuse.data.hub import check_labels, class_names, name_of, open_splits
from slimfuse.errors import DataError

KINDS = (".csv", ".jsonl")
TEXT = ("string", "large_string")
CLASSES = (*TEXT, "int", "uint", "bool", "null")  # beginnings of types
SHOWN = 6


def load_texts(
    path: str,
    *,
    config: str | None = None,
    folder: bool = False,
    train_split: str = "train",
    test_split: str = "test",
    text_column: str = "text",
    label_column: str = "label",
) -> TextData:
    """Return a text classification data set from a hub name, a local folder or a folder of tables.

    `folder=True` reads `path` as a folder with one table a split, `train.csv` and `test.csv` or
    `.jsonl`, whose columns have names. Classes are those of a class label, else the different
    values that the training split has, in order of the alphabet, or of size where all are whole
    numbers. No code from the data set is run. Raises DataError with the columns and splits that
    exist, or with the first row that has no text.
    """
    splits = (train_split, test_split)
    columns = {"text_column": text_column, "label_column": label_column}
    tables = _tables(path, splits) if folder else None

    def load() -> Any:
        import datasets

        if tables is None:
            return datasets.load_dataset(path, config)
        return {split: _read(file) for split, file in tables.items()}

    parts = open_splits(path, load, splits, columns)
    texts = [_texts(p, s, text_column, path) for p, s in zip(parts, splits, strict=True)]
    names = class_names(parts, label_column, path)
    if names is None:
        names, labels = _classes(parts, label_column, path)
    else:
        labels = [_array(part[label_column]) for part in parts]
    check_labels(path, splits, labels)
    train, test = (Split(*both) for both in zip(texts, labels, strict=True))
    return text_data(name_of(path), train, test, names)


def text_data(name: str, train: Split, test: Split, classes: Sequence[str]) -> TextData:
    """Return two splits of texts as a data set, with the sha256 of all its content."""
    digest = hashlib.sha256(f"{list(classes)}\n".encode())
    for split in (train, test):
        digest.update(f"{len(split)}\n".encode())
        for text, label in zip(split.items, split.labels, strict=True):
            raw = text.encode()
            digest.update(b"%d %d\n%b" % (label, len(raw), raw))
    return TextData(name, train, test, tuple(classes), digest.hexdigest())


def _tables(path: str, splits: Sequence[str]) -> dict[str, Path]:
    """Return the splits' files, all of one kind; raises DataError where there are none."""
    root = Path(path)
    if not root.is_dir():
        raise DataError("the text folder does not exist", where=f"data.path {path}", got=path)
    for kind in KINDS:
        files = {split: root / f"{split}{kind}" for split in splits}
        if all(file.is_file() for file in files.values()):
            return files
    found = sorted(f.name for f in root.iterdir() if f.suffix in KINDS)
    raise DataError(
        "the splits' tables do not exist",
        where=f"data.path {path}",
        got=", ".join(found) or "neither .csv nor .jsonl files",
        allowed=" and ".join(f"{s}.csv" for s in splits) + ", or .jsonl in place of .csv",
        hint="set data.train_split and data.test_split to the files' names",
    )


def _read(file: Path) -> Any:
    """Return a table; every cell of a CSV is text: no guessed numbers, and "NA" is a word."""
    import datasets

    if file.suffix == ".jsonl":
        return datasets.load_dataset("json", data_files=str(file), split="train")
    with file.open(newline="", encoding="utf-8-sig") as lines:
        header = next(csv.reader(lines), [])
    features = datasets.Features(dict.fromkeys(header, datasets.Value("string")))
    return datasets.load_dataset(
        "csv", data_files=str(file), split="train", features=features, keep_default_na=False
    )


def _texts(part: Any, split: str, column: str, path: str) -> list[str]:
    """Return a split's texts; raises DataError for the first row that has none."""
    where = f"data.text_column of {path}"
    kind = getattr(part.features[column], "dtype", None)
    if kind not in TEXT and len(part):
        raise DataError(
            f"column {column!r} is not text",
            where=where,
            got=str(part.features[column]),
            hint="set data.text_column",
        )
    texts = list(part[column])
    for i, text in enumerate(texts):
        if text is None or not text.strip():
            raise DataError(
                f"split {split!r} has a row without text",
                where=where,
                got=f"{text!r} in row {i + 1}",
                allowed="text in every row",
            )
    return texts


def _classes(
    parts: Sequence[Any], column: str, path: str
) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    """Return the classes of a column of names or whole numbers, and the splits' labels."""
    kind = getattr(parts[0].features[column], "dtype", "")
    if not kind.startswith(CLASSES):
        raise DataError(
            f"column {column!r} is not a class label",
            where=f"data.label_column of {path}",
            got=str(parts[0].features[column]),
            allowed="class labels, names or whole numbers",
        )
    values = [["" if y is None else str(y) for y in part[column]] for part in parts]
    train, test = (set(of_split) - {""} for of_split in values)
    if train and test - train:
        raise DataError(
            "the splits have different classes",
            where=f"data.path {path}",
            got=f"only in the test split: {', '.join(sorted(test - train)[:SHOWN])}",
        )
    whole = all(re.fullmatch(r"-?\d+", y) for y in train)
    names = sorted(train, key=(lambda y: (int(y), y)) if whole else None)
    places = {y: i for i, y in enumerate(names)}
    return tuple(names), [_array(places.get(y) for y in of_split) for of_split in values]


def _array(labels: Iterable[int | None]) -> NDArray[np.int64]:
    """Return labels as numbers, -1 where there is none."""
    return np.array([-1 if y is None else y for y in labels], dtype=np.int64)
