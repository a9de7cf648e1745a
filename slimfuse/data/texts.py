"""Texts with and without labels: tables of a hub, of a local folder, or plain files of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimfuse.data.base import Kind, Split, TextData
from slimfuse.data.hub import SHOWN, check_names, name_of, open_splits
from slimfuse.data.labels import TEXT, read_labels
from slimfuse.data.tables import PROSE, TABLES, Rows, Unit, read_file
from slimfuse.errors import DataError


def load_texts(
    path: str,
    *,
    config: str | None = None,
    folder: bool = False,
    train_split: str = "train",
    test_split: str = "test",
    text_column: str = "text",
    label_column: str | Sequence[str] = "label",
    kind: Kind = "single",
    separator: str | None = None,
    unit: Unit = "line",
) -> TextData:
    """Return texts from a hub name, a local folder or a folder of tables or of prose.

    `folder=True` reads `path` as a folder with one file a split: `train.csv` and `test.csv` or
    `.jsonl`, whose columns have names, or `.txt`, which has no labels and of which each line with
    words is a text (unit: line), or what stands between empty lines (paragraph).

    kind: what a label is. Classes (single, multi) are those of a class label, else the different
    values that the training split has, in order of the alphabet, or of size where all are whole
    numbers. Several classes (multi) are a list in `label_column`, or names with `separator`
    between them; or `label_column` names several columns of 0 and 1, one a class. A number
    (regression) is a cell of `label_column`. Without labels (none) `label_column` isn't looked at.

    No code from the data set is run. Raises DataError with the columns and splits that exist, or
    with the first row that can't be read.
    """
    splits = (train_split, test_split)
    several = not isinstance(label_column, str)
    chosen = tuple(label_column) if several else (str(label_column),)
    columns = [("text_column", text_column)]
    if kind != "none":
        columns += [("label_columns" if several else "label_column", name) for name in chosen]
    files = _files(path, splits, labelled=kind != "none") if folder else {}
    lines: dict[str, list[int]] = {}

    def load() -> Any:
        import datasets

        if not folder:
            return datasets.load_dataset(path, config)
        tables = {split: read_file(file, unit) for split, file in files.items()}
        lines.update({split: own for split, (_, own) in tables.items()})
        return {split: table for split, (table, _) in tables.items()}

    parts = open_splits(path, load, splits, columns)
    if not folder and kind in ("single", "multi"):
        check_names(path, config, splits, chosen[0])
    rows = [Rows(split, path, files.get(split), lines.get(split, ())) for split in splits]
    texts = [_texts(part, own, text_column) for part, own in zip(parts, rows, strict=True)]
    names, labels = read_labels(parts, rows, kind, chosen, separator)
    train, test = (Split(*both) for both in zip(texts, labels, strict=True))
    return text_data(name_of(path), train, test, names, kind)


def text_data(
    name: str, train: Split, test: Split, classes: Sequence[str], kind: Kind = "single"
) -> TextData:
    """Return two splits of texts as a data set, with the sha256 of all its content."""
    head = f"{list(classes)}\n" if kind == "single" else f"{kind} {list(classes)}\n"
    digest = hashlib.sha256(head.encode())
    for split in (train, test):
        digest.update(f"{len(split)}\n".encode())
        for text, label in zip(split.items, split.labels, strict=True):
            raw = text.encode()
            if split.labels.dtype == np.int64:
                digest.update(b"%d %d\n%b" % (label, len(raw), raw))
            else:
                digest.update(b"%b %d\n%b" % (label.astype("<f4").tobytes(), len(raw), raw))
    return TextData(name, train, test, tuple(classes), digest.hexdigest(), kind=kind)


def _files(path: str, splits: Sequence[str], *, labelled: bool) -> dict[str, Path]:
    """Return the splits' files, all of one kind; raises DataError where there are none."""
    root = Path(path)
    if not root.is_dir():
        raise DataError("the text folder does not exist", where=f"data.path {path}", got=path)
    for kind in TABLES if labelled else (*TABLES, PROSE):
        files = {split: root / f"{split}{kind}" for split in splits}
        if all(file.is_file() for file in files.values()):
            return files
    found = sorted(f.name for f in root.iterdir() if f.is_file() and not f.name.startswith("."))
    raise DataError(
        "the splits' tables do not exist" if labelled else "the splits' files do not exist",
        where=f"data.path {path}",
        got=", ".join(found[:SHOWN]) + (", …" if len(found) > SHOWN else "") or "no file",
        allowed=" and ".join(f"{s}.csv" for s in splits)
        + ("" if not labelled else " with labels")
        + f", or {'.jsonl' if labelled else '.jsonl or .txt'} in place of .csv",
        hint="save the tables with commas, as .csv"
        if any(name.endswith(".tsv") for name in found)
        else "set data.train_split and data.test_split to the files' names",
    )


def _texts(part: Any, rows: Rows, column: str) -> list[str]:
    """Return a split's texts; raises DataError where there are none and for a row without one."""
    rows.need_some(len(part))
    kind = getattr(part.features[column], "dtype", None)
    if kind not in TEXT:
        raise DataError(
            f"column {column!r} is not text",
            where=f"data.text_column of {rows.path}",
            got=str(part.features[column]),
            hint="set data.text_column",
        )
    texts = list(part[column])
    for i, text in enumerate(texts):
        if text is None or not text.strip():
            raise DataError(
                f"split {rows.split!r} has a row without text",
                where=f"{rows.place(i)}, column {column!r}",
                got=repr(text),
                allowed="text in every row",
                hint="write one, leave the row out, or set data.text_column",
            )
    return texts
