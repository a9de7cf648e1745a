"""Inputs that a model is judged on: the folder's own samples, or random ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse_export.errors import ExportError
from slimfuse_export.folder import MODEL, SAMPLES
from slimfuse_export.inputs import make_inputs, resize_batch
from slimfuse_export.parity import Case, load_reference
from slimfuse_export.sessions import Arrays, first_line, open_session, run_session

RANDOM_BATCHES = (1, 3, 5)
LABELS = "labels"
CHUNK = 16  # rows that run at once


def reference_cases(
    folder: Path, *, dims: Mapping[str, int] | None = None, seed: int = 0
) -> list[Case]:
    """Return the cases of onnx/samples.npz, or what the model itself gives for random inputs.

    dims: sizes of dynamic dims other than the first, for random inputs.
    Raises: ExportError where the model or the samples can't be read, or dims lack a size.
    """
    if (folder / SAMPLES).is_file():
        return load_reference(folder / SAMPLES)
    session = open_session(folder / MODEL, threads=1)
    inputs = [make_inputs(session, rows, dims=dims, seed=seed) for rows in RANDOM_BATCHES]
    return [Case(given, run_session(session, given)) for given in inputs]


def load_rows(path: str | os.PathLike[str]) -> tuple[list[Arrays], NDArray[Any] | None]:
    """Return the inputs in an .npz file, and its labels where it has any; nothing is unpickled.

    The file is one of reference cases, or holds an array (rows, …) for each input by name, and
    `labels` (rows,) or (rows, positions).
    Raises: ExportError for a missing, corrupt, pickled or otherwise laid out file.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError("the file of rows does not exist", where=path, allowed="an .npz file")
    try:
        with np.load(path, allow_pickle=False) as stored:
            if any("/" in key for key in stored.files):
                return [case.inputs for case in load_reference(path)], None
            arrays = {key: stored[key] for key in stored.files}
    except ExportError:
        raise
    except Exception as error:  # a corrupt archive fails in many ways
        raise ExportError("the file holds no rows", where=path, got=first_line(error)) from error
    labels = arrays.pop(LABELS, None)
    counts = {name: len(a) if a.ndim else 0 for name, a in arrays.items()}
    counts |= {LABELS: len(labels)} if labels is not None else {}
    if not arrays or len(set(counts.values())) != 1 or not min(counts.values()):
        raise ExportError(
            "the arrays are no rows of inputs", where=path, got=counts,
            allowed="arrays with as many rows as each other, at least 1",
        )  # fmt: skip
    rows = range(0, next(iter(counts.values())), CHUNK)
    return [
        {name: a[first : first + CHUNK] for name, a in arrays.items()} for first in rows
    ], labels


def rows_of(cases: Sequence[Case]) -> Callable[[int], dict[str, NDArray[Any]]]:
    """Return a maker of inputs of any number of rows, from those of the largest case."""
    largest = max(cases, key=lambda case: len(next(iter(case.inputs.values()))))
    return lambda rows: resize_batch(largest.inputs, rows)


def distinct_rows(cases: Sequence[Case]) -> list[dict[str, NDArray[Any]]]:
    """Return every row of the cases once, as inputs of one row."""
    seen: dict[bytes, dict[str, NDArray[Any]]] = {}
    for case in cases:
        for row in range(len(next(iter(case.inputs.values())))):
            one = {name: np.asarray(a)[row : row + 1] for name, a in case.inputs.items()}
            key = b"".join(one[n].tobytes() + repr(one[n].shape).encode() for n in sorted(one))
            seen.setdefault(key, one)
    return list(seen.values())
