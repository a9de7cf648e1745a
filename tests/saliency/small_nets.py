"""Networks so small that their Fisher can be held whole, float64."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from slimfuse.saliency.gradients import gradients
from slimfuse.saliency.patterns import Layer, prunable

Pair = tuple[Tensor, Tensor]


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    """Return a random MLP with tanh between its layers: no gradient is nought by accident."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def pairs(n: int, width: int, classes: int, seed: int = 1) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def singles(data: Pair) -> list[Pair]:
    """Return batches of one sample."""
    return list(zip(data[0].split(1), data[1].split(1), strict=True))


def loss(model: nn.Module, pair: Pair) -> Tensor:
    return nn.functional.cross_entropy(model(pair[0]), pair[1])


def rows(model: nn.Module, data: Pair, layer: Layer | None = None) -> Tensor:
    """Return the per-sample gradients (m, d) of a layer (the first)."""
    layer = layer or prunable(model)[0]
    found = [g[layer.name] for g in gradients(model, loss, singles(data), [layer.name])]
    return torch.cat(found).flatten(1)


def dense_fisher(x: Tensor, block: int, damping: float) -> Tensor:
    """Return λI + XᵀX/m (d, d) with noughts between different blocks, written out."""
    place = torch.arange(x.shape[1]) // block
    gram = sum(torch.outer(g, g) for g in x) / len(x)
    return gram * (place[:, None] == place) + damping * torch.eye(x.shape[1]).double()
