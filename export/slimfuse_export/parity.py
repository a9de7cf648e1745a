"""Does the ONNX model give what the original gave?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slimfuse_export._files import replacing
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.sessions import Arrays, first_line, open_session, run_session


@dataclass(frozen=True)
class Parity:
    """How far two equally shaped arrays lie apart.

    max_abs: largest |got − reference|, in the reference's unit. max_rel: max_abs over the
    reference's largest magnitude. rms_rel: root mean square of the difference over the
    reference's. shapes: of every input and of the output. n: values compared.
    """

    max_abs: float
    max_rel: float
    rms_rel: float
    shapes: dict[str, tuple[int, ...]]
    n: int


class Case(NamedTuple):
    """Inputs of one batch and the outputs the original model gave for them, by name."""

    inputs: Arrays
    outputs: Arrays


def check_parity(
    onnx_path: str | os.PathLike[str],
    inputs: Arrays,
    reference: NDArray[Any],
    *,
    output: str = "logits",
    atol: float,
    rtol: float,
    threads: int = 1,
) -> Parity:
    """Run the model once and hold `output` against `reference`, value by value.

    A value passes when |got − reference| ≤ atol + rtol · max(|reference|, rms of the reference):
    sums that cancel to a small value round like their terms.
    Raises: CheckFailed when a value is above tolerance or not finite, or the shapes differ;
    ExportError for a missing or corrupt file and for inputs or outputs that don't fit it.
    """
    got = run_session(open_session(onnx_path, threads=threads), inputs, [output])[output]
    shapes = {name: value.shape for name, value in inputs.items()}
    where = f"{onnx_path}, output {output}"
    return compare(got, reference, atol=atol, rtol=rtol, where=where, name=output, shapes=shapes)


def compare(
    got: NDArray[Any],
    reference: NDArray[Any],
    *,
    atol: float,
    rtol: float,
    where: str = "",
    name: str = "logits",
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> Parity:
    """Return the distance of two arrays; raise CheckFailed as `check_parity` does.

    where, name, shapes: for the error's and the result's words only.
    """
    place = where or None
    if got.shape != reference.shape:
        raise CheckFailed("the shapes differ", where=place, got=got.shape, allowed=reference.shape)
    if not got.size:
        raise CheckFailed("there is nothing to compare", where=place, got=got.shape)
    for label, array in (("the model's output", got), ("the reference", reference)):
        if wrong := int(np.count_nonzero(~np.isfinite(array))):
            raise CheckFailed(f"{label} is not finite", where=place, got=f"{wrong} bad values")
    truth = reference.astype(np.float64)
    gap = np.abs(got.astype(np.float64) - truth)
    norm = float(np.sqrt(np.mean(truth**2)))
    excess = gap - (atol + rtol * np.maximum(np.abs(truth), norm))
    if (above := int(np.count_nonzero(excess > 0))) > 0:
        worst = np.unravel_index(int(excess.argmax()), gap.shape)
        raise CheckFailed(
            "the model differs from its reference",
            where=place,
            got=f"max |Δ| {gap.max():.3g}; {above} of {gap.size} values above tolerance, "
            f"the worst at {[int(i) for i in worst]}: {got[worst]:.6g} for {truth[worst]:.6g}",
            allowed=f"|Δ| ≤ {atol:g} + {rtol:g}·max(|reference|, {norm:.3g})",
        )
    largest = float(np.abs(truth).max())
    return Parity(
        max_abs=float(gap.max()),
        max_rel=_over(float(gap.max()), largest),
        rms_rel=_over(float(np.sqrt(np.mean(gap**2))), norm),
        shapes={**(shapes or {}), name: got.shape},
        n=got.size,
    )


def check_cases(
    path: str | os.PathLike[str],
    cases: Sequence[Case],
    *,
    atol: float,
    rtol: float,
    threads: int = 1,
) -> tuple[float, int]:
    """Return the largest |Δ| of a model from the outputs of all cases, and how many values.

    Raises: as `check_parity`.
    """
    session = open_session(path, threads=threads)
    worst, n = 0.0, 0
    for index, (inputs, outputs) in enumerate(cases):
        for name, value in run_session(session, inputs, list(outputs)).items():
            where = f"case {index}, output {name}"
            parity = compare(value, outputs[name], atol=atol, rtol=rtol, where=where)
            worst, n = max(worst, parity.max_abs), n + parity.n
    return worst, n


def _over(gap: float, scale: float) -> float:
    if not gap:
        return 0.0
    return gap / scale if scale else float("inf")


def save_reference(path: str | os.PathLike[str], cases: Sequence[tuple[Arrays, Arrays]]) -> None:
    """Write (inputs, outputs) cases, usually of several batch sizes, to an .npz file.

    The file appears whole or not at all, and equal cases give equal bytes.
    Raises: ExportError for no cases, for another suffix and for arrays of Python objects.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ExportError("references are .npz files", where=path, got=path.suffix, allowed=".npz")
    arrays = {
        f"{index}/{side}/{name}": np.asarray(value)
        for index, case in enumerate(cases)
        for side, values in zip(("inputs", "outputs"), case, strict=True)
        for name, value in values.items()
    }
    if not arrays:
        raise ExportError("there are no cases to save", where=path)
    if pickled := sorted(name for name, array in arrays.items() if array.dtype.hasobject):
        raise ExportError("arrays of Python objects can't be saved", where=path, got=pickled)
    with replacing(path) as part:
        np.savez(part, allow_pickle=False, **arrays)


def load_reference(path: str | os.PathLike[str]) -> list[Case]:
    """Return the cases of a file that `save_reference` wrote; nothing in it is unpickled.

    Raises: ExportError for a missing, corrupt, pickled or otherwise laid out file.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError("the reference does not exist", where=path, allowed="an .npz file")
    cases: dict[int, tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for key in stored.files:
                index, side, name = key.split("/", 2)
                pair = cases.setdefault(int(index), ({}, {}))
                pair[("inputs", "outputs").index(side)][name] = stored[key]
    except Exception as error:  # a corrupt archive fails in many ways
        raise ExportError(
            "the file holds no reference cases", where=path, got=first_line(error)
        ) from error
    if not cases or not all(inputs and outputs for inputs, outputs in cases.values()):
        raise ExportError("a reference case lacks inputs or outputs", where=path)
    return [Case(*cases[index]) for index in sorted(cases)]
