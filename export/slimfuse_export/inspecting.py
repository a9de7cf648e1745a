"""What a model file is, read from the file alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from slimfuse_export.errors import ExportError
from slimfuse_export.graph import load_model, model_bytes, shape_of
from slimfuse_export.metadata import STANDARD, Metadata, min_onnxruntime, opset_of, read_metadata
from slimfuse_export.sessions import first_line

_PACKED = "MatMulNBits"  # several weights in a byte
_MIN_DIMS = 2  # biases and scales are no weights


@dataclass(frozen=True)
class ModelFacts:
    """What is in a model file.

    bytes: on disk, with data files. params: stored numbers, 4-bit ones counted one by one.
    zeros: share of zeros among the weights (tensors of 2 dims or more that are not packed).
    precision: numbers by how they are stored. operators: how often each occurs; other domains than
    the standard one before a dot. inputs, outputs: dims by name. metadata: None where it has none.
    """

    bytes: int
    params: int
    zeros: float
    precision: dict[str, int]
    operators: dict[str, int]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    opset: int
    ir_version: int
    min_onnxruntime: str
    metadata: Metadata | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, fit for JSON."""
        return asdict(self)


def inspect_model(path: str | os.PathLike[str]) -> ModelFacts:
    """Return what the model file at `path` is.

    Raises: ExportError for a missing or corrupt file, or one newer than this tool knows.
    """
    model = load_model(path)
    try:
        return _facts(path, model)
    except (ValueError, StopIteration, OverflowError, TypeError) as error:
        raise ExportError(
            "the file's weights are not what it says of them", where=path, got=first_line(error),
            hint="export the model again; slimfuse-export check says more",
        ) from error  # fmt: skip


def _facts(path: str | os.PathLike[str], model: onnx.ModelProto) -> ModelFacts:
    graph = model.graph
    packed = {
        node.input[1]: next(a.i for a in node.attribute if a.name == "bits")
        for node in graph.node
        if node.op_type == _PACKED
    }
    scales = {name for n in graph.node if n.op_type == _PACKED for name in n.input[2:]}
    precision: Counter[str] = Counter()
    zeros = weights = 0
    for tensor in graph.initializer:
        count = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.name in packed:
            bits = packed[tensor.name]
            precision[f"int{bits}"] += count * 8 // bits
            continue
        precision[TensorProto.DataType.Name(tensor.data_type).lower()] += count
        if len(tensor.dims) >= _MIN_DIMS and tensor.name not in scales:
            weights += count
            zeros += count - int(np.count_nonzero(numpy_helper.to_array(tensor)))
    known = {tensor.name for tensor in graph.initializer}
    return ModelFacts(
        bytes=model_bytes(path),
        params=sum(precision.values()),
        zeros=zeros / weights if weights else 0.0,
        precision=dict(precision.most_common()),
        operators=dict(Counter(_operator(node) for node in graph.node).most_common()),
        inputs={value.name: shape_of(value) for value in graph.input if value.name not in known},
        outputs={value.name: shape_of(value) for value in graph.output},
        opset=opset_of(model),
        ir_version=model.ir_version,
        min_onnxruntime=min_onnxruntime(model),
        metadata=read_metadata(path),
    )


def _operator(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def inspect_folder(folder: str | os.PathLike[str]) -> dict[str, ModelFacts]:
    """Return the facts of every model in a folder's onnx/, by file name, see `inspect_model`."""
    return {file.name: inspect_model(file) for file in sorted(Path(folder, "onnx").glob("*.onnx"))}
