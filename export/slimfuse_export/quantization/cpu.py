"""Which kind of quantised file suits this CPU."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from slimfuse_export.environment import cpu_field, cpu_info
from slimfuse_export.sessions import open_session, run_session


@dataclass(frozen=True)
class QuantizationPlan:
    """What this CPU's instructions lead to expect; only `bench` tells what is so.

    mode: "dynamic-int8" where integer kernels should beat float ones, else "float32".
    reduce_range: 7-bit weights, for x86 CPUs that saturate when they add u8·s8 products.
    signed: activations in int8 rather than uint8, for ARM's signed products (static only).
    """

    mode: Literal["dynamic-int8", "float32"]
    reason: str
    reduce_range: bool
    signed: bool = False


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
            return QuantizationPlan("dynamic-int8", f"ARM dot products ({named})", False, True)
        return QuantizationPlan("float32", "ARM without 8-bit dot products", False, True)
    for flag, reason in (
        ("amx_int8", "AMX integer tiles"),
        ("avx512_vnni", "AVX512-VNNI"),
        ("avx_vnni", "AVX-VNNI"),
    ):
        if flag in flags:
            return QuantizationPlan("dynamic-int8", f"8-bit products by {reason}", False)
    if "avx2" in flags:
        reason = "AVX2 without VNNI: a smaller gain, and 7-bit weights against saturation"
        return QuantizationPlan("dynamic-int8", reason, True)
    return QuantizationPlan("float32", "no fast 8-bit instructions known on this CPU", False)


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
