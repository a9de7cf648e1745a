"""INT8 files and the plan for a CPU."""

import hashlib
import logging
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from slimfuse_export import (
    ExportError,
    check_dims,
    compare,
    int8_saturates,
    open_session,
    quantization_plan,
    quantize_dynamic_int8,
    run_session,
)

X = {"pixel_values": np.random.default_rng(3).standard_normal((9, 3, 7)).astype(np.float32)}


def logits(path):
    return run_session(open_session(path, threads=1), X)["logits"]


def test_the_quantised_model_is_close_and_keeps_its_interface(write, tmp_path):
    source, target = write(), tmp_path / "int8.onnx"
    done = quantize_dynamic_int8(source, target)
    assert done.products == 2
    assert (done.source_bytes, done.bytes) == (source.stat().st_size, target.stat().st_size)
    assert check_dims(target) == check_dims(source)
    # 8 bits over about ±3 σ leave about 1 % noise; float equality would mean nothing was done
    error = compare(logits(target), logits(source), atol=np.inf, rtol=0).rms_rel
    assert 1e-4 < error < 0.03
    kinds = {t.data_type for t in onnx.load(str(target)).graph.initializer if len(t.dims) == 2}
    assert kinds == {TensorProto.INT8}


WRITERS = ("quantize_dynamic_int8", "quantize_static_int8", "quantize_int4")


@pytest.mark.parametrize("writer", WRITERS)
def test_equal_sources_give_equal_bytes(finished, tmp_path, writer):
    # other processes hash strings otherwise, so an order that hangs on sets would show
    code = (
        "import sys; from pathlib import Path; from slimfuse_export import *\n"
        "folder, target = map(Path, sys.argv[1:])\n"
        "rows = [case.inputs for case in reference_cases(folder)]\n"
        f"more = [rows] if {writer!r} == 'quantize_static_int8' else []\n"
        f"{writer}(folder / 'onnx/model.onnx', target, *more)"
    )
    digests = set()
    for seed, name in (("7", "one.onnx"), ("8", "other_name.onnx")):
        subprocess.run(
            [sys.executable, "-c", code, finished, tmp_path / name], check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_it_is_quiet_and_leaves_nothing_behind(write, tmp_path, capfd, caplog):
    handlers = logging.getLogger().handlers.copy()
    quantize_dynamic_int8(write(), tmp_path / "int8.onnx")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.getLogger().handlers == handlers
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "tiny.onnx"]


def test_a_failure_keeps_the_old_file(write, tmp_path):
    target = tmp_path / "int8.onnx"
    target.write_bytes(b"old")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "no_product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch_size", 3])],
    )
    source = tmp_path / "relu.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(source))
    with pytest.raises(ExportError, match="nothing to quantise"):
        quantize_dynamic_int8(source, target)
    source.write_bytes(b"garbage")
    with pytest.raises(ExportError, match="no ONNX model"):
        quantize_dynamic_int8(source, target)
    with pytest.raises(ExportError, match="does not exist"):
        quantize_dynamic_int8(tmp_path / "none.onnx", target)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "relu.onnx"]


def test_the_source_is_never_overwritten(write):
    source = write()
    with pytest.raises(ExportError, match="overwrite"):
        quantize_dynamic_int8(source, source.parent / "." / source.name)


@pytest.mark.parametrize(
    ("machine", "flags", "mode", "reduce_range"),
    [
        ("x86_64", "flags : fpu avx2 avx512f avx512_vnni amx_int8", "dynamic-int8", False),
        ("x86_64", "flags : fpu avx2 avx_vnni", "dynamic-int8", False),
        ("AMD64", "flags : fpu avx2", "dynamic-int8", True),
        ("x86_64", "flags : fpu avx2 avx512f", "dynamic-int8", True),
        ("x86_64", "flags : fpu sse4_2", "float32", False),
        ("aarch64", "Features : fp asimd asimddp", "dynamic-int8", False),
        ("aarch64", "Features : fp asimd", "float32", False),
    ],
)
def test_the_plan_follows_the_flags(machine, flags, mode, reduce_range):
    plan = quantization_plan(f"processor : 0\nmodel name : Some CPU\n{flags}\n", machine)
    assert (plan.mode, plan.reduce_range) == (mode, reduce_range)
    assert plan.reason


def test_the_plan_of_this_machine_agrees_with_what_it_computes(tmp_path):
    if int8_saturates(tmp_path):
        assert quantization_plan().reduce_range
    assert not list(tmp_path.iterdir())
