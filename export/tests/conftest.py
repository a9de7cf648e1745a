"""Tiny classifiers of odd, distinct sizes, and finished folders around them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from slimfuse_export import (
    open_session,
    quantize_dynamic_int8,
    run_session,
    save_reference,
    stamp_file,
)

SHAPE, HIDDEN, CLASSES = (3, 7), 34, 5
Writer = Callable[..., Path]


def tiny_model(
    *, batch: str | int = "batch_size", seed: int = 0, shift: float = 0.0, hidden: int = HIDDEN
) -> onnx.ModelProto:
    """flatten → MatMul → Relu → Gemm; shift perturbs one logit's bias."""
    rng = np.random.default_rng(seed)
    width = int(np.prod(SHAPE))
    bias = np.zeros(CLASSES, np.float32)
    bias[2] += shift
    weights = {
        "w1": rng.standard_normal((width, hidden)).astype(np.float32) / width**0.5,
        "w2": rng.standard_normal((CLASSES, hidden)).astype(np.float32) / hidden**0.5,
        "b2": bias,
    }
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixel_values"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w1"], ["hidden"], "first"),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"], "second", transB=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [batch, *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def pixels(batch: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"pixel_values": rng.standard_normal((batch, *SHAPE)).astype(np.float32)}


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Save a tiny model under a name in the test's folder."""

    def save(name: str = "tiny.onnx", **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(tiny_model(**options), str(path))
        if path.parent.name == "onnx":  # in a folder it says what it is
            stamp_file(path, step="export")
        return path

    return save


@pytest.fixture
def finished(tmp_path: Path, write: Writer) -> Path:
    """A whole folder: config, weights, ONNX, INT8 and samples of two batch sizes."""
    folder = tmp_path / "run" / "model"
    source = write("run/model/onnx/model.onnx")
    quantize_dynamic_int8(source, folder / "onnx" / "model_quantized.onnx")
    session = open_session(source, threads=1)
    cases = [(x, run_session(session, x)) for x in (pixels(2), pixels(7))]
    save_reference(folder / "onnx" / "samples.npz", cases)
    (folder / "config.json").write_text(json.dumps({"architectures": ["TinyForTests"]}))
    data = np.arange(6, dtype=np.float32).tobytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, len(data)]}})
    weights = len(header).to_bytes(8, "little") + header.encode() + data
    (folder / "model.safetensors").write_bytes(weights)
    return folder
