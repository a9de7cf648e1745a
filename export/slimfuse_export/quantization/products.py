"""The matrix products of a graph that have constant weights, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from slimfuse_export.errors import ExportError
from slimfuse_export.graph import load_model

# Everything else is left alone: the library's own choice makes invalid graphs at opset 23 and 24
OP_TYPES = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm with constant weights: its node's name, what it reads and what it writes."""

    name: str
    weight: str
    input: str
    output: str


def products(graph: onnx.GraphProto) -> list[Product]:
    """Return the products with constant weights, in the graph's order."""
    constants = {tensor.name for tensor in graph.initializer}
    return [
        Product(node.name, node.input[1], node.input[0], node.output[0])
        for node in graph.node
        if node.op_type in OP_TYPES and node.input[1] in constants
    ]


def product_weights(path: str | Path) -> dict[str, NDArray[np.generic]]:
    """Return the weights of a file's products with constant ones, by the products' names."""
    model = load_model(path)
    named(model)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    return {p.name: onnx.numpy_helper.to_array(values[p.weight]) for p in products(model.graph)}


def without_weights(graph: onnx.GraphProto) -> list[str]:
    """Return the nodes that multiply two activations, as attention does."""
    known = {product.name for product in products(graph)}
    return [n.name for n in graph.node if n.op_type in OP_TYPES and n.name not in known]


def named(model: onnx.ModelProto) -> None:
    """Give every product without a name one, so that it can be spoken of."""
    for index, node in enumerate(model.graph.node):
        if node.op_type in OP_TYPES and not node.name:
            node.name = f"product_{index}"


def excluded(graph: onnx.GraphProto, keep_float: Sequence[str]) -> list[str]:
    """Return the nodes that names of nodes or weights mean, as the library knows them.

    Raises: ExportError naming every one that is no product with constant weights.
    """
    known = products(graph)
    by_word = {product.name: product.name for product in known}
    by_word |= {product.weight: product.name for product in known}
    if unknown := [word for word in keep_float if word not in by_word]:
        raise ExportError(
            "not the name of a product with constant weights, nor of such weights",
            where="keep_float", got=", ".join(unknown),
            allowed=", ".join(product.name for product in known),
        )  # fmt: skip
    nodes = list(dict.fromkeys(by_word[word] for word in keep_float))
    return [*nodes, *(f"{node}_MatMul" for node in nodes)]  # what the library makes of a Gemm


def made_small(graph: onnx.GraphProto) -> int:
    """Return how many products of a graph are computed from quantised weights."""
    unpacked = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return sum(
        node.op_type in ("MatMulInteger", "MatMulNBits")
        or (node.op_type in OP_TYPES and node.input[1] in unpacked)
        for node in graph.node
    )
