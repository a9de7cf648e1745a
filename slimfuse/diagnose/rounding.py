"""Which layers must stay in float: what computing each of them with rounded numbers does.

KL ≈ ½ E (g·δ)², g = JᵀSξ a random probe by a layer's outputs and δ what rounding adds to them: the
mixed-precision list without labels and without a quantised model. Source: arXiv 2307.04719;
diagnostics.md §4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimfuse.diagnose.answers import Kind, Labelled, Read, flat
from slimfuse.diagnose.curvature import Estimate
from slimfuse.diagnose.probing import Patience, only, probe

Round = Callable[[Tensor], Tensor]
"""Rows (n, m) -> what rounding adds to them."""


@dataclass(frozen=True)
class Scheme:
    """How a product is computed with small numbers: how its weights (out, in) and inputs round."""

    weights: Round
    inputs: Round = torch.zeros_like


@dataclass(frozen=True)
class LayerForecast:
    """KL that rounding one layer is expected to cost, in nats a sample, by the scheme's name."""

    layer: str
    costs: Mapping[str, Estimate]
    numbers: int


def rounding(rows: Tensor, bits: int, block: int | None = None) -> Tensor:
    """Return what rounding rows (n, m) to so many bits adds to them.

    Symmetric, with a scale for every row, or for every `block` of its numbers.
    """
    exact = rows.detach().double()
    found = []
    for part in [exact] if block is None else exact.split(block, 1):
        scale = part.abs().amax(1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
        found.append((part / scale).round() * scale)
    return (torch.cat(found, 1) - exact).to(rows.dtype)


def dynamic_rounding(rows: Tensor) -> Tensor:
    """Return what rounding all of a tensor to 0 … 255 with one scale adds to it.

    The range holds zero, which stays exact: ONNX's DynamicQuantizeLinear.
    """
    exact = rows.detach().double()
    low, high = exact.amin().clamp_max(0), exact.amax().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-30)
    zero = (-low / scale).round()
    return (((exact / scale).round() + zero).clamp(0, 255) - zero).mul(scale).sub(exact).to(rows)


BLOCK = 32  # inputs of a 4-bit product that share a scale
INT8 = Scheme(lambda w: rounding(w, 8), dynamic_rounding)
INT4 = Scheme(lambda w: rounding(w, 4, BLOCK), lambda x: rounding(x, 8, BLOCK))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's matrix products with weights, by their names."""
    kinds = (nn.Linear, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def matrix(layer: nn.Module) -> Tensor:
    """Return a layer's weights (out, in); GPT-2's lie the other way round."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (weight.T if isinstance(layer, Conv1D) else weight).detach()


def by_layer(
    model: nn.Module,
    singles: Iterable[Labelled],
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, Scheme],
    kind: Kind,
    read: Read = flat,
    *,
    probes: int = 1,
    seed: int = 0,
    patience: Patience | None = None,
) -> tuple[list[LayerForecast], dict[str, Estimate]]:
    """Return the cost of rounding every layer alone and all together, for several schemes at once.

    singles: samples one by one. Each probe takes one backward pass, whatever the number of layers
    and schemes; labels aren't looked at. Take samples that the model was not trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = {name: matrix(layer) for name, layer in layers.items()}
    moved = {what: {n: s.weights(w) for n, w in exact.items()} for what, s in schemes.items()}
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def observe(_module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            if not made.requires_grad:  # the first layer's, as no weight asks for gradients
                made.requires_grad_()
            seen.append((name, given[0].detach(), made))

        return observe

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    order = {name: place for place, name in enumerate(layers)}
    products: dict[str, list[Tensor]] = {what: [] for what in schemes}
    try:
        for given in (patience or Patience()).over(singles):
            for _ in range(probes):
                passed = _passed(model, given, kind, generator, read, seen)
                for what, scheme in schemes.items():
                    row = torch.zeros(len(order), dtype=torch.float64)
                    for name, x, g in passed:
                        rows, change = x.flatten(0, -2), moved[what][name]
                        delta = rows @ change.T + scheme.inputs(rows) @ (exact[name] + change).T
                        row[order[name]] += (g.flatten(0, -2).double() * delta).sum().cpu()
                    products[what].append(row)
                del passed  # before the next pass
    finally:
        for handle in handles:
            handle.remove()
    found = {what: torch.stack(rows) for what, rows in products.items()}
    forecasts = [
        LayerForecast(
            name,
            {what: Estimate.of(rows[:, i].square() / 2) for what, rows in found.items()},
            exact[name].numel(),
        )
        for i, name in enumerate(layers)
    ]
    return forecasts, {what: Estimate.of(r.sum(1).square() / 2) for what, r in found.items()}


def _passed(
    model: nn.Module,
    given: Labelled,
    kind: Kind,
    generator: torch.Generator,
    read: Read,
    seen: list[tuple[str, Tensor, Tensor]],
) -> list[tuple[str, Tensor, Tensor]]:
    """Return layers' names, inputs and probes by their outputs, of one pass that `seen` watches."""
    with only(model), torch.enable_grad():
        value = probe(model, given, kind, generator, read)
        outputs = [made for _, _, made in seen]
        slopes = torch.autograd.grad(value, outputs, allow_unused=True)
    names = [(name, x) for name, x, _ in seen]
    seen.clear()
    return [(*known, g) for known, g in zip(names, slopes, strict=True) if g is not None]


def dearest(found: Sequence[LayerForecast], what: str) -> list[LayerForecast]:
    """Return layers by what rounding them costs a number, the dearest first."""
    return sorted(found, key=lambda one: -one.costs[what].value / one.numbers)


def in_float(
    found: Sequence[LayerForecast], what: str, allowed: float
) -> tuple[tuple[str, ...], float]:
    """Return the layers to leave as they are so that the rest costs at most `allowed` nats.

    The `dearest` go first. Also returns what the others cost together, cross terms left out.
    """
    left = {one.layer: one.costs[what].value for one in found}
    kept: list[str] = []
    for one in dearest(found, what):
        if sum(left.values()) <= allowed:
            break
        kept.append(one.layer)
        del left[one.layer]
    return tuple(kept), sum(left.values())
