"""A finished model folder: its parts, and whether each does what it must when opened cold."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.folder_parts import (
    LOCK,
    config_named,
    metadata_true,
    recipe_beside,
    weights_whole,
)
from slimfuse_export.graph import check_dims, check_graph
from slimfuse_export.inputs import dynamic_dims, make_inputs, resize_batch, resize_dims
from slimfuse_export.metadata import Provenance, read_metadata
from slimfuse_export.parity import Case, check_cases, compare, load_reference
from slimfuse_export.sessions import open_session, run_session

MODEL = Path("onnx/model.onnx")
INT8 = Path("onnx/model_quantized.onnx")
OPTIMIZED = Path("onnx/model_optimized.onnx")
SAMPLES = Path("onnx/samples.npz")

_ODD_BATCHES = (1, 3, 5)  # none divides another but 1: a batch baked into a Reshape shows
_ODD_SIZES = (1, 3, 7)  # of other dynamic dims, as far as they are no larger than the samples'
_INT8_MAX_RMS = 0.5  # a sanity bound: the task's own metric judges INT8, this finds broken files


@dataclass(frozen=True)
class CheckResult:
    """One check of a folder: its name, whether it held, and what was found or went wrong."""

    name: str
    passed: bool
    detail: str


def check_folder(
    folder: str | os.PathLike[str],
    *,
    atol: float = 1e-3,
    rtol: float = 1e-3,
    dims: Mapping[str, int] | None = None,
) -> list[CheckResult]:
    """Open a finished folder from its files alone and return every check, passed or not.

    Checked: config.json; model.safetensors (header and length); onnx/model.onnx and, where they
    exist, onnx/model_optimized.onnx and onnx/model_quantized.onnx: onnx.checker, named dims,
    metadata that is true and fits this onnxruntime, batches of 1, 3 and 5, sizes 1, 3 and 7 of
    other dynamic dims, and agreement with onnx/samples.npz where that exists; the recipe's hash
    where its lock file lies in the folder above. A float model's rows must not depend on
    their batch; INT8 scales do by design, so there the outputs' RMS error has a lenient bound.
    atol, rtol: of the float comparisons. dims: sizes of dynamic dims other than the first, which
    are needed where there are no samples.
    Raises: ExportError where `folder` is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError("there is no such folder", where=folder)
    results = [
        _attempt("config.json", lambda: config_named(folder / "config.json")),
        _attempt("model.safetensors", lambda: weights_whole(folder / "model.safetensors")),
    ]
    cases: list[Case] = []
    if (folder / SAMPLES).exists():
        results.append(_attempt(SAMPLES.as_posix(), lambda: _load(folder / SAMPLES, cases)))

    def make(session: ort.InferenceSession, batch: int) -> dict[str, NDArray[Any]]:
        if cases:
            return resize_batch(cases[0].inputs, batch)
        return make_inputs(session, batch, dims=dims)

    made_of = _made_of(folder / MODEL)
    for model in (MODEL, OPTIMIZED, INT8):
        path = folder / model
        if model != MODEL and not path.exists():
            continue
        results += _model_checks(folder, model, make, made_of)
        if not results[-1].passed:
            continue
        if model == INT8:
            results.append(_attempt(f"{INT8}: error", lambda: _int8_error(folder, make)))
            continue
        results.append(_attempt(f"{model}: rows", partial(_rows, path, make, atol, rtol)))
        if cases:
            results.append(_attempt(f"{model}: samples", _parity(path, cases, atol, rtol)))
    if made_of is not None and (folder.parent / LOCK).is_file():
        results.append(_attempt(LOCK, lambda: recipe_beside(folder, made_of)))
    return results


def _made_of(path: Path) -> Provenance | None:
    try:
        said = read_metadata(path)
    except ExportError:  # told by the check of its metadata
        return None
    return said.provenance if said else None


Maker = Callable[[ort.InferenceSession, int], dict[str, NDArray[Any]]]


def _attempt(name: str, step: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, step())
    except ExportError as error:
        return CheckResult(name, False, str(error))


def _model_checks(
    folder: Path, model: Path, make: Maker, made_of: Provenance | None
) -> list[CheckResult]:
    """Return graph, dims, metadata and sizes; the last says whether the model runs."""
    path = folder / model

    def graph() -> str:
        check_graph(path)
        return "accepted by onnx.checker"

    def dims() -> str:
        return ", ".join(f"{name} {list(shape)}" for name, shape in check_dims(path).items())

    def metadata() -> str:
        return metadata_true(path, default=model == MODEL, made_of=made_of)

    def sizes() -> str:
        session = open_session(path, threads=1)
        tried: list[tuple[int, dict[str, int]]] = [(batch, {}) for batch in _ODD_BATCHES]
        tried += [
            (max(_ODD_BATCHES), {name: size})
            for name, limit in dynamic_dims(session, make(session, 1)).items()
            for size in _ODD_SIZES
            if size <= limit
        ]
        for batch, dims in tried:
            _run_sized(session, resize_dims(session, make(session, batch), dims), batch, dims)
        ran = [f"batches of {', '.join(map(str, _ODD_BATCHES))}"]
        for name in dict.fromkeys(name for _, dims in tried for name in dims):
            ran.append(f"{name} {', '.join(str(d[name]) for _, d in tried if name in d)}")
        return f"ran {'; '.join(ran)}"

    steps = (("graph", graph), ("dims", dims), ("metadata", metadata), ("sizes", sizes))
    return [_attempt(f"{model}: {name}", step) for name, step in steps]


def _run_sized(
    session: ort.InferenceSession,
    inputs: Mapping[str, NDArray[Any]],
    batch: int,
    dims: Mapping[str, int],
) -> None:
    """Run once and hold the outputs' shapes against the sizes of their named dims."""
    declared = {value.name: value.shape for value in session.get_outputs()}
    at = ", ".join((f"batch {batch}", *(f"{name} {size}" for name, size in dims.items())))
    for name, value in run_session(session, inputs).items():
        wanted = (batch, *(dims.get(d, d) if isinstance(d, str) else d for d in declared[name][1:]))
        # what is named but not asked for may have any size
        fits = len(wanted) == value.ndim and all(
            isinstance(want, str) or want == got
            for want, got in zip(wanted, value.shape, strict=True)
        )
        if not fits:
            raise CheckFailed(
                "the output has another shape than it says", where=f"{name}, {at}",
                got=value.shape, allowed=wanted,
            )  # fmt: skip
        if not np.all(np.isfinite(value)):
            raise CheckFailed("the output is not finite", where=f"{name}, {at}")


def _rows(path: Path, make: Maker, atol: float, rtol: float) -> str:
    session = open_session(path, threads=1)
    batch = max(_ODD_BATCHES)
    inputs = make(session, batch)
    together = run_session(session, inputs)
    worst = 0.0
    for row in range(batch):
        alone = run_session(session, {k: a[row : row + 1] for k, a in inputs.items()})
        for name, value in alone.items():
            where = f"output {name}, row {row} of {batch} against the row alone"
            got = together[name][row : row + 1]
            worst = max(worst, compare(got, value, atol=atol, rtol=rtol, where=where).max_abs)
    return f"a row gives the same alone and in a batch, max |Δ| {worst:.2g}"


def _parity(path: Path, cases: Sequence[Case], atol: float, rtol: float) -> Callable[[], str]:
    def step() -> str:
        worst, n = check_cases(path, cases, atol=atol, rtol=rtol)
        return f"max |Δ| {worst:.2g} over {n} values of {len(cases)} cases"

    return step


def _int8_error(folder: Path, make: Maker) -> str:
    float_session, int8_session = (open_session(folder / m, threads=1) for m in (MODEL, INT8))
    inputs = make(float_session, max(_ODD_BATCHES))
    truth, got = run_session(float_session, inputs), run_session(int8_session, inputs)
    worst = max(
        compare(got[name], truth[name], atol=np.inf, rtol=0, where=f"output {name}").rms_rel
        for name in truth
    )
    if worst > _INT8_MAX_RMS:
        raise CheckFailed(
            "the INT8 model has little to do with the float one",
            got=f"RMS error {worst:.1%} of the output",
            allowed=f"{_INT8_MAX_RMS:.0%}",
            hint="on a CPU without VNNI quantise with reduced range",
        )
    return f"RMS error {worst:.2%} of the float model's output"


def _load(path: Path, cases: list[Case]) -> str:
    cases += load_reference(path)
    return f"{len(cases)} cases"
