"""How much noise each quantised product adds by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from slimfuse_export.graph import load_model, save_model
from slimfuse_export.quantization.products import Product, named, products
from slimfuse_export.sessions import Arrays, open_session, run_session

GROUPS = 8


@dataclass(frozen=True)
class Noise:
    """A product's signal to quantisation noise ratio in dB; infinite where it stayed float."""

    product: str
    sqnr: float


def product_noise(src: str | Path, quantized: str | Path, inputs: Sequence[Arrays]) -> list[Noise]:
    """Return each product's SQNR, the noisiest first: 10·log10(Σ y² / Σ (y − ŷ)²).

    y, ŷ: its outputs in the float and in the quantised graph, both for the *float* graph's input
    to it, so that noise of the layers before does not count. inputs: of the model, any rows.
    """
    source = load_model(src)
    named(source)
    found = products(source.graph)
    with TemporaryDirectory(prefix="slimfuse-noise-") as folder:
        seen, alone = Path(folder) / "seen.onnx", Path(folder) / "alone.onnx"
        save_model(_exposed(source, found), seen)
        save_model(_cut(load_model(quantized), found), alone)
        float_session = open_session(seen, threads=1)
        small_session = open_session(alone, threads=1)
        needed = {value.name for value in small_session.get_inputs()}
        signal, noise = np.zeros(len(found)), np.zeros(len(found))
        for given in inputs:
            truth = run_session(float_session, given)
            got = run_session(small_session, {name: truth[_raw(name)] for name in needed})
            for index, product in enumerate(found):
                y, y_hat = (_double(one[product.output]) for one in (truth, got))
                signal[index] += np.sum(y**2)
                noise[index] += np.sum((y - y_hat) ** 2)
    ratios = [10 * math.log10(s / n) if n else math.inf for s, n in zip(signal, noise, strict=True)]
    noisy = [Noise(product.name, r) for product, r in zip(found, ratios, strict=True)]
    return sorted(noisy, key=lambda one: one.sqnr)


def fallbacks(names: Sequence[str], keep_float: Sequence[str] = ()) -> Iterator[tuple[str, ...]]:
    """Yield ever longer lists of products to keep float: the first eighth, then two, …, half.

    names: of all products, the worst first. keep_float: names that are on every list. With more
    than half of them float there is little left to gain.
    """
    names = [name for name in names if name not in keep_float]
    group = max(1, math.ceil(len(names) / GROUPS))
    for count in range(group, len(names) // 2 + 1, group):
        yield (*keep_float, *names[:count])


def _double(values: NDArray[np.generic]) -> NDArray[np.float64]:
    return values.astype(np.float64)


def _exposed(source: onnx.ModelProto, found: Sequence[Product]) -> onnx.ModelProto:
    """Return the float graph with what products read and write as its outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(source)
    wanted = dict.fromkeys(name for p in found for name in (p.input, p.output))
    known = {value.name for value in model.graph.output}
    _declare(model.graph.output, [name for name in wanted if name not in known])
    return model


def _cut(quantized: onnx.ModelProto, found: Sequence[Product]) -> onnx.ModelProto:
    """Return the quantised products alone: each reads the float graph's tensor as an input."""
    graph = quantized.graph
    made_by = {output: node for node in graph.node for output in node.output}
    reads = {product.input for product in found}
    kept: dict[str, onnx.NodeProto] = {}  # by first output, which names it
    used: set[str] = set()

    def keep(name: str) -> None:
        node = made_by.get(name)
        if node is None or node.output[0] in kept:
            return
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        kept[node.output[0]] = copy
        for index, read in enumerate(node.input):
            if read in reads:  # where the walk back from this product ends
                copy.input[index] = _given(read)
                used.add(_given(read))
            else:
                keep(read)

    for product in found:
        keep(product.output)
    del graph.input[:], graph.output[:], graph.value_info[:]
    _declare(graph.input, sorted(used))
    _declare(graph.output, [product.output for product in found])
    nodes = [kept[node.output[0]] for node in graph.node if node.output[0] in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    needed = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    return quantized


def _given(name: str) -> str:
    return f"{name} (float)"


def _raw(name: str) -> str:
    return name.removesuffix(" (float)")


def _declare(values: Any, names: Sequence[str]) -> None:
    values.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
