"""Open an ONNX model in onnxruntime on the CPU, with everything that sways latency pinned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slimfuse_export.errors import CheckFailed, ExportError

Arrays = Mapping[str, NDArray[Any]]
Optimization = Literal["all", "extended", "basic", "disabled"]

_LEVELS: dict[Optimization, ort.GraphOptimizationLevel] = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_ERROR = 3  # onnxruntime's severity scale: 0 verbose … 4 fatal


def open_session(
    path: str | os.PathLike[str], *, threads: int, optimization: Optimization = "all"
) -> ort.InferenceSession:
    """Return a CPU session on the model at `path`.

    threads: intra-op threads, 1 or more; inter-op is 1. Above one thread the pool does not spin:
    spinning threads of several live sessions take each other's cores (measured: p95 doubles).
    optimization: onnxruntime's graph optimisation level.
    Raises: ExportError for a missing or corrupt file, a bad thread count or level.
    """
    path = Path(path)
    options = session_options(threads=threads, optimization=optimization)
    require_model(path)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base but Exception
        raise ExportError(
            "onnxruntime can't open the model",
            where=path,
            got=first_line(error),
            hint="export the model again; the file is corrupt, cut off or lacks its data file",
        ) from error


def session_options(*, threads: int, optimization: Optimization = "all") -> ort.SessionOptions:
    """Return the options of `open_session`, which says what they are.

    Raises: ExportError for a bad thread count or level.
    """
    if threads < 1:
        raise ExportError("the number of threads is not legal", got=threads, allowed="1 or more")
    if optimization not in _LEVELS:
        raise ExportError(
            "unknown graph optimisation level", got=optimization, allowed=get_args(Optimization)
        )
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = _LEVELS[optimization]
    options.log_severity_level = _ERROR
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def require_model(path: Path) -> None:
    """Raise ExportError unless `path` is a file."""
    if not path.is_file():
        what = "the model is a folder, not a file" if path.is_dir() else "the model does not exist"
        raise ExportError(what, where=path, allowed="an .onnx file")


def run_session(
    session: ort.InferenceSession, inputs: Arrays, outputs: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Return the named outputs (all of them by default) of one call, by name.

    Raises: ExportError where inputs or outputs are missing or unknown (all gaps at once),
    CheckFailed where the model itself fails on them.
    """
    declared = {value.name for value in session.get_inputs()}
    known = [value.name for value in session.get_outputs()]
    wanted = list(known if outputs is None else outputs)
    gaps = [
        ("missing inputs", sorted(declared - set(inputs))),
        ("unknown inputs", sorted(set(inputs) - declared)),
        ("unknown outputs", sorted(set(wanted) - set(known))),
    ]
    if any(names for _, names in gaps):
        raise ExportError(
            "the inputs or outputs don't fit the model",
            got="; ".join(f"{kind}: {', '.join(names)}" for kind, names in gaps if names),
            allowed=f"inputs {', '.join(sorted(declared))}; outputs {', '.join(known)}",
        )
    try:
        values = session.run(wanted, dict(inputs))
    except Exception as error:
        shapes = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in inputs.items())
        raise CheckFailed(
            "the model fails on these inputs", where=shapes, got=first_line(error)
        ) from error
    return {name: np.asarray(value) for name, value in zip(wanted, values, strict=True)}


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's text, or its class where it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
