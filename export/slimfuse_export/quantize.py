"""Dynamic INT8: which kind suits this CPU, and the quantised file itself."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from slimfuse_export._files import replacing
from slimfuse_export.environment import cpu_field, cpu_info
from slimfuse_export.errors import ExportError
from slimfuse_export.graph import check_graph, model_bytes, read_graph
from slimfuse_export.sessions import first_line, open_session, run_session

# Everything else is left alone: the library's own choice makes invalid graphs at opset 23 and 24
OP_TYPES = ("MatMul", "Gemm")


@dataclass(frozen=True)
class QuantizationPlan:
    """What this CPU's instructions lead to expect; only `bench` tells what is so.

    mode: "dynamic-int8" where integer kernels should beat float ones, else "float32".
    reduce_range: 7-bit weights, for x86 CPUs that saturate when they add u8·s8 products.
    """

    mode: Literal["dynamic-int8", "float32"]
    reason: str
    reduce_range: bool


@dataclass(frozen=True)
class Quantized:
    """What quantising did: matrix products made INT8, bytes on disk before and after, and how."""

    products: int
    source_bytes: int
    bytes: int
    per_channel: bool
    reduce_range: bool


def quantization_plan(cpuinfo: str | None = None, machine: str | None = None) -> QuantizationPlan:
    """Return the mode this CPU is likely to be fast in, from its instruction-set flags.

    cpuinfo: text in the format of /proc/cpuinfo. machine: as `platform.machine()`. Both default
    to this machine's.
    """
    machine = (machine or platform.machine()).lower()
    text = cpu_info() if cpuinfo is None else cpuinfo
    flags = set(cpu_field(text, "flags", "Features").split())
    if machine.startswith(("arm", "aarch")):
        found = sorted(flags & {"i8mm", "asimddp"})
        if found or (not flags and platform.system() == "Darwin"):
            named = ", ".join(found) or "Apple silicon"
            return QuantizationPlan("dynamic-int8", f"ARM dot products ({named})", False)
        return QuantizationPlan("float32", "ARM without 8-bit dot products", False)
    for flag, reason in (
        ("amx_int8", "AMX integer tiles"),
        ("avx512_vnni", "AVX512-VNNI"),
        ("avx_vnni", "AVX-VNNI"),
    ):
        if flag in flags:
            return QuantizationPlan("dynamic-int8", f"{reason} multiplies 8-bit integers", False)
    if "avx2" in flags:
        reason = "AVX2 without VNNI: a smaller gain, and 7-bit weights against saturation"
        return QuantizationPlan("dynamic-int8", reason, True)
    return QuantizationPlan("float32", "no fast 8-bit instructions known on this CPU", False)


def quantize_dynamic_int8(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    per_channel: bool = True,
    reduce_range: bool = False,
) -> Quantized:
    """Write the model at `src` with INT8 weights and dynamically quantised activations to `dst`.

    Only products with a constant right-hand side change. `dst` appears whole, after onnx.checker
    and onnxruntime have accepted it, or not at all; equal sources give equal bytes.
    per_channel: one scale for each output column. reduce_range: see `QuantizationPlan`.
    Raises: ExportError for a missing or corrupt source, one without such a product, or one the
    library can't quantise; CheckFailed where its result is invalid.
    """
    src, dst = Path(src), Path(dst)
    read_graph(src)  # a clear error for a missing or corrupt source
    if dst.exists() and dst.samefile(src):
        raise ExportError("the quantised model would overwrite its source", where=src)
    with replacing(dst) as part:
        _quantize(src, part, per_channel=per_channel, reduce_range=reduce_range)
        check_graph(part)
        open_session(part, threads=1)
        products = sum(node.op_type == "MatMulInteger" for node in read_graph(part).node)
        if not products:
            raise ExportError(
                "nothing to quantise: no matrix product with constant weights", where=src
            )
    return Quantized(products, model_bytes(src), model_bytes(dst), per_channel, reduce_range)


def _quantize(src: Path, dst: Path, *, per_channel: bool, reduce_range: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    try:
        with _quiet():
            quantize_dynamic(
                onnx.load(str(src)),  # given a path, the library writes *-inferred.onnx beside it
                str(dst),
                op_types_to_quantize=list(OP_TYPES),
                per_channel=per_channel,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
            )
    except Exception as error:
        raise ExportError(
            "onnxruntime can't quantise the model", where=src, got=first_line(error)
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's advice off the root logger, and its `basicConfig` from installing one."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [logging.NullHandler()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers = handlers


def int8_saturates(folder: str | os.PathLike[str]) -> bool:
    """Return whether this machine's u8·s8 product of extreme values is wrong, by running it.

    folder: where a small model may be written for the time of the call.
    True means that `reduce_range` is needed here.
    """
    rows, inner, columns = 5, 64, 34
    weights = helper.make_tensor("w", TensorProto.INT8, [inner, columns], [127] * (inner * columns))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inner])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, columns])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = Path(folder) / "probe.onnx"
    onnx.save(model, str(path))
    try:
        x = np.full((rows, inner), 255, np.uint8)
        y = run_session(open_session(path, threads=1), {"x": x})["y"]
    finally:
        path.unlink(missing_ok=True)
    return bool(np.any(y != 255 * 127 * inner))
