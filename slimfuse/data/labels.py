"""Labels of tables: one class a row, several, or a number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse.data.base import Kind, no_labels
from slimfuse.data.hub import SHOWN, check_labels, class_names
from slimfuse.data.tables import Rows
from slimfuse.errors import DataError

TEXT = ("string", "large_string")
CLASSES = (*TEXT, "int", "uint", "bool", "null")  # beginnings of types
Names = tuple[str, ...]
Labels = list[NDArray[Any]]


def read_labels(
    parts: Sequence[Any],
    splits: Sequence[Rows],
    kind: Kind,
    columns: Sequence[str],
    separator: str | None,
) -> tuple[Names, Labels]:
    """Return the classes and every split's labels, as `Split` has them.

    parts: the splits' tables, the training one first; splits: where their rows stand; columns: one,
    or, of several classes a row, also one of 0 and 1 for each class; separator: between the names
    in one cell. Raises DataError with the first row that can't be read.
    """
    if kind == "none":
        return (), [no_labels(len(part)) for part in parts]
    if kind == "single":
        return _single(parts, splits, columns[0])
    if kind == "multi" and len(columns) == 1:
        return _several(parts, splits, columns[0], separator)
    found = [
        np.stack([_numbers(part, rows, c, kind) for c in columns], axis=1)
        for part, rows in zip(parts, splits, strict=True)
    ]
    if kind == "regression":
        return tuple(columns), [numbers[:, 0] for numbers in found]
    return tuple(columns), list(found)


def _single(parts: Sequence[Any], splits: Sequence[Rows], column: str) -> tuple[Names, Labels]:
    path = splits[0].path
    names = class_names(parts, column, path)
    if names is None:
        kind = getattr(parts[0].features[column], "dtype", "")
        if not kind.startswith(CLASSES):
            raise DataError(
                f"column {column!r} is not a class label",
                where=f"data.label_column of {path}",
                got=str(parts[0].features[column]),
                allowed="class labels, names or whole numbers",
                hint="for numbers set data.label_kind to regression, for lists to multi",
            )
        values = [["" if y is None else str(y) for y in part[column]] for part in parts]
        names, places = _ordered(*(set(of_split) - {""} for of_split in values), path=path)
        labels = [_array(places.get(y) for y in of_split) for of_split in values]
    else:
        labels = [_array(part[column]) for part in parts]
    check_labels(splits, labels)
    return names, list(labels)


def _several(
    parts: Sequence[Any], splits: Sequence[Rows], column: str, separator: str | None
) -> tuple[Names, Labels]:
    """Return the labels of a column of lists, or of names with a separator between them."""
    path = splits[0].path
    features = [part.features[column] for part in parts]
    inner = [getattr(feature, "feature", None) for feature in features]
    names = getattr(inner[0], "names", None)
    if any(getattr(feature, "names", None) != names for feature in inner):
        raise DataError("the splits have different classes", where=f"data.path {path}")
    words = separator is not None and getattr(features[0], "dtype", None) in TEXT
    if inner[0] is None and not words:
        raise DataError(
            f"column {column!r} has no lists of names",
            where=f"data.label_column of {path}",
            got=str(features[0]),
            hint="set data.label_separator to what stands between the names, or data.label_columns "
            "to columns of 0 and 1",
        )

    def cut(cell: Any) -> list[str]:
        if words:
            return [name for word in cell.split(separator) if (name := word.strip())]
        return [str(y) if names is None else names[y] for y in cell if y is not None]

    found = []
    for part, rows in zip(parts, splits, strict=True):
        cells = part[column]
        for i, cell in enumerate(cells):
            if cell is None:
                raise _bad(column, rows, i, cell, "a list, which may be empty")
        found.append([cut(cell) for cell in cells])
    if names is None:
        seen = [{name for row in of_split for name in row} for of_split in found]
        names, places = _ordered(*seen, path=path)
    else:
        places = {name: i for i, name in enumerate(names)}
    labels = []
    for of_split in found:
        marks = np.zeros((len(of_split), len(names)), dtype=np.float32)
        for mark, row in zip(marks, of_split, strict=True):
            mark[[places[name] for name in row]] = 1
        labels.append(marks)
    return tuple(names), labels


def _numbers(part: Any, rows: Rows, column: str, kind: Kind) -> NDArray[np.float32]:
    """Return a column of numbers; raises DataError for the first row that has none."""
    allowed = "a finite number" if kind == "regression" else "0 or 1"
    found = np.zeros(len(part), dtype=np.float32)
    for i, cell in enumerate(part[column]):
        try:
            value = float(cell)
        except (TypeError, ValueError):
            value = float("nan")
        if not isfinite(value) or (kind == "multi" and value not in (0, 1)):
            raise _bad(column, rows, i, cell, allowed)
        found[i] = value
    return found


def _bad(column: str, rows: Rows, row: int, cell: Any, allowed: str) -> DataError:
    return DataError(
        f"split {rows.split!r} has a label that can't be read",
        where=f"{rows.place(row)}, column {column!r}",
        got=repr(cell),
        allowed=allowed,
        hint="mend the row, or set data.label_kind to what the labels are",
    )


def _ordered(train: set[str], test: set[str], *, path: str) -> tuple[Names, dict[str, int]]:
    """Return the classes in order of the alphabet, or of size if whole numbers, and their places.

    Raises DataError where the test split has others.
    """
    if train and test - train:
        raise DataError(
            "the splits have different classes",
            where=f"data.path {path}",
            got=f"only in the test split: {', '.join(sorted(test - train)[:SHOWN])}",
            hint="put rows of them into the training split, too, or leave them out",
        )
    whole = all(re.fullmatch(r"-?\d+", y) for y in train)
    names = sorted(train, key=(lambda y: (int(y), y)) if whole else None)
    return tuple(names), {y: i for i, y in enumerate(names)}


def _array(labels: Iterable[int | None]) -> NDArray[np.int64]:
    """Return labels as numbers, -1 where there is none."""
    return np.array([-1 if y is None else y for y in labels], dtype=np.int64)
