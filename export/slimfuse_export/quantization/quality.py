"""How much worse a quantised file is than the float one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse_export.errors import ExportError
from slimfuse_export.sessions import Arrays, open_session, run_session

Loss = Callable[[Path], float]
"""What a file loses against the float one, 0 for nothing; in the unit of `max_drop`."""
LOGITS = "logits"


def disagreement(src: Path, inputs: Sequence[Arrays]) -> Loss:
    """Return the loss that needs no labels: how often, or how far, the two answer otherwise.

    For an output `logits`: the share of rows (or positions) with another highest class; for any
    other: 1 − the mean cosine similarity of the vectors in the last dim.
    """
    truth = _answers(src, inputs)

    def loss(path: Path) -> float:
        gaps = [
            _gap(name, want[name], got[name])
            for want, got in zip(truth, _answers(path, inputs), strict=True)
            for name in want
        ]
        return float(np.mean(np.concatenate(gaps)))

    return loss


def _gap(name: str, want: NDArray[Any], got: NDArray[Any]) -> NDArray[np.float64]:
    """Return the loss of each row, or of each position."""
    one, two = want.astype(np.float64), got.astype(np.float64)
    if one.shape[-1] == 1:  # a number: how far off, on the scale of the numbers
        gap = np.abs(one - two) / (np.abs(one).mean() + 1e-12)
    elif name == LOGITS:
        gap = np.not_equal(one.argmax(-1), two.argmax(-1)).astype(np.float64)
    else:
        lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
        gap = 1 - np.sum(one * two, -1) / np.maximum(lengths, 1e-12)
    return np.ravel(np.asarray(gap, np.float64))


def lost_accuracy(src: Path, inputs: Sequence[Arrays], labels: NDArray[Any]) -> Loss:
    """Return the loss of accuracy on labelled rows.

    labels: (rows,) or (rows, positions) of class numbers; below 0 where there is none.
    Raises: ExportError where the model's output doesn't fit them.
    """
    base = _accuracy(src, inputs, labels)
    return lambda path: base - _accuracy(path, inputs, labels)


def _accuracy(path: Path, inputs: Sequence[Arrays], labels: NDArray[Any]) -> float:
    outputs = [next(iter(answer.values())) for answer in _answers(path, inputs)]
    highest = np.concatenate([one.argmax(-1) for one in outputs])
    if highest.shape != labels.shape:
        raise ExportError(
            "the labels don't fit the model's answers", where=path, got=labels.shape,
            allowed=highest.shape,
        )  # fmt: skip
    asked = labels >= 0
    return float(np.mean(highest[asked] == labels[asked]))


def _answers(path: Path, inputs: Sequence[Arrays]) -> list[dict[str, NDArray[Any]]]:
    session = open_session(path, threads=1)
    return [run_session(session, one) for one in inputs]
