"""A finished model folder: its parts, and whether each does what it must when opened cold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.graph import check_dims, check_graph
from slimfuse_export.inputs import make_inputs, resize_batch
from slimfuse_export.parity import Case, check_cases, compare, load_reference
from slimfuse_export.sessions import open_session, run_session

MODEL = Path("onnx/model.onnx")
INT8 = Path("onnx/model_quantized.onnx")
OPTIMIZED = Path("onnx/model_optimized.onnx")
SAMPLES = Path("onnx/samples.npz")

_ODD_BATCHES = (1, 3, 5)  # none divides another but 1: a batch baked into a Reshape shows
_MAX_HEADER = 100 * 2**20  # bytes of JSON, the limit of the safetensors library
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

    Checked: config.json; model.safetensors (header and length); onnx/model.onnx and, where it
    exists, onnx/model_quantized.onnx: onnx.checker, named dynamic dims, batches of 1, 3 and 5,
    and agreement with onnx/samples.npz where that exists. A float model's rows must not depend on
    their batch; INT8 scales do by design, so there the outputs' RMS error has a lenient bound.
    atol, rtol: of the float comparisons. dims: sizes of dynamic dims other than the first, which
    are needed where there are no samples.
    Raises: ExportError where `folder` is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError("there is no such folder", where=folder)
    results = [
        _attempt("config.json", lambda: _config(folder / "config.json")),
        _attempt("model.safetensors", lambda: _weights(folder / "model.safetensors")),
    ]
    cases: list[Case] = []
    if (folder / SAMPLES).exists():
        results.append(_attempt(SAMPLES.as_posix(), lambda: _load(folder / SAMPLES, cases)))

    def make(session: ort.InferenceSession, batch: int) -> dict[str, NDArray[Any]]:
        if cases:
            return resize_batch(cases[0].inputs, batch)
        return make_inputs(session, batch, dims=dims)

    results += _model_checks(folder, MODEL, make)
    if results[-1].passed:
        results.append(_attempt(f"{MODEL}: rows", lambda: _rows(folder / MODEL, make, atol, rtol)))
        if cases:
            step = _parity(folder / MODEL, cases, atol, rtol)
            results.append(_attempt(f"{MODEL}: samples", step))
    if (folder / INT8).exists():
        results += _model_checks(folder, INT8, make)
        if results[-1].passed:
            results.append(_attempt(f"{INT8}: error", lambda: _int8_error(folder, make)))
    return results


Maker = Callable[[ort.InferenceSession, int], dict[str, NDArray[Any]]]


def _attempt(name: str, step: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, step())
    except ExportError as error:
        return CheckResult(name, False, str(error))


def _model_checks(folder: Path, model: Path, make: Maker) -> list[CheckResult]:
    """Return graph, dims and batches; the last says whether the model runs."""
    path = folder / model

    def graph() -> str:
        check_graph(path)
        return "accepted by onnx.checker"

    def dims() -> str:
        return ", ".join(f"{name} {list(shape)}" for name, shape in check_dims(path).items())

    def batches() -> str:
        session = open_session(path, threads=1)
        for batch in _ODD_BATCHES:
            for name, value in run_session(session, make(session, batch)).items():
                if value.shape[:1] != (batch,):
                    raise CheckFailed("rows are lost", where=name, got=value.shape, allowed=batch)
                if not np.all(np.isfinite(value)):
                    raise CheckFailed("the output is not finite", where=f"{name}, batch {batch}")
        return f"ran batches of {', '.join(map(str, _ODD_BATCHES))}"

    steps = (("graph", graph), ("dims", dims), ("batches", batches))
    return [_attempt(f"{model}: {name}", step) for name, step in steps]


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


def _config(path: Path) -> str:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ExportError("config.json can't be read", got=type(error).__name__) from error
    if not isinstance(config, dict):
        raise ExportError("config.json is no JSON object", got=type(config).__name__)
    named = config.get("architectures") or config.get("architecture") or "no architecture named"
    return ", ".join(named) if isinstance(named, list) else str(named)


def _weights(path: Path) -> str:
    """Read the header alone: tensors must tile the rest of the file without gap or overlap."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(handle.read(length))
        spans = sorted(header[name]["data_offsets"] for name in header if name != "__metadata__")
        edges = [0, *(end for _, end in spans)]
        if [begin for begin, _ in spans] != edges[:-1] or edges[-1] != size - 8 - length:
            raise ValueError(f"tensors end at {edges[-1]} of {size - 8 - length} bytes of data")
    except (OSError, ValueError, TypeError, KeyError) as error:
        detail = f"{type(error).__name__}: {error}" if isinstance(error, ValueError) else None
        raise ExportError(
            "the weights are missing or cut off", got=detail or type(error).__name__
        ) from error
    return f"{len(spans)} tensors, {size:,} bytes"
