"""Inputs that a model is judged on: the folder's own samples, or random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse_export.folder import MODEL, SAMPLES
from slimfuse_export.inputs import make_inputs, resize_batch
from slimfuse_export.parity import Case, load_reference
from slimfuse_export.sessions import open_session, run_session

RANDOM_BATCHES = (1, 3, 5)


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
