"""What an alignment has to know: two models' activations on the same inputs, as moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs
from slimfuse.families import Block, Layout
from slimfuse.fuse import walk
from slimfuse.moments import Moments


@dataclass(frozen=True)
class Step:
    """What a model does between two points of its stream; all (batch·tokens, width), float64.

    stream: after the step; parts: q, k, context (the heads' outputs) or units (the MLP's).
    """

    stream: Tensor
    parts: dict[str, Tensor]


def steps(model: nn.Module, layout: Layout, batch: Inputs) -> Iterator[Step]:
    """Yield the embedding, then every attention and every MLP, as `walk.streams` orders them."""
    begun = walk.start(model, layout, batch)
    x = begun.stream
    yield Step(walk.rows(x), {})
    for block, told in zip(layout.blocks, begun.calls, strict=True):
        x, parts = _attention(model, block, x, told)
        yield Step(walk.rows(x), parts)
        units, out = walk.mlp(model, block, x)
        x = x + out
        yield Step(walk.rows(x), {"units": walk.rows(units)})


def _attention(
    model: nn.Module, block: Block, x: Tensor, told: walk.Call
) -> tuple[Tensor, dict[str, Tensor]]:
    normed = walk.apply(model, block.attention_norm, x)
    context = walk.attend(model, block, x, told)
    parts = {
        "q": walk.rows(walk.apply(model, block.q, normed)),
        "k": walk.rows(walk.apply(model, block.k, normed)),
        "context": walk.rows(context),
    }
    return x + walk.apply(model, block.o, context), parts


def direction(stream: Tensor) -> Tensor:
    """Return P x / |P x| (rows, d): what LayerNorm leaves of a stream, at unit length."""
    centred = stream - stream.mean(1, keepdim=True)
    unit: Tensor = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit


def row_weights(importance: Tensor | None, depth: int, samples: int) -> Tensor | None:
    """Return the weights of rows (samples·tokens,) at a depth of `importance` (depths, tokens)."""
    return None if importance is None else importance[depth].double().repeat(samples)


class Cross:
    """Weighted covariance of two sites' units, and each unit's variance, streamed in float64."""

    def __init__(self) -> None:
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._weight = 0.0
        self._outer = self._sum_a = self._sum_b = torch.zeros(())
        self._square_a = self._square_b = torch.zeros(())

    def update(self, weights: Tensor | None, a: Tensor, b: Tensor) -> None:
        """Add rows a (rows, n) and b (rows, m)."""
        a, b = a.double().cpu(), b.double().cpu()
        if self._shifts is None:
            self._shifts = a.mean(0), b.mean(0)
        a, b = a - self._shifts[0], b - self._shifts[1]
        w = torch.ones(len(a), dtype=a.dtype) if weights is None else weights
        heavy = w[:, None] * a
        self._weight += float(w.sum())
        self._outer = self._outer + heavy.T @ b
        self._sum_a, self._sum_b = self._sum_a + heavy.sum(0), self._sum_b + w @ b
        self._square_a = self._square_a + (heavy * a).sum(0)
        self._square_b = self._square_b + w @ b.square()

    def covariance(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Cov[a, b] (n, m), Var[a] (n,) and Var[b] (m,)."""
        a, b = self._sum_a / self._weight, self._sum_b / self._weight
        return (
            self._outer / self._weight - torch.outer(a, b),
            self._square_a / self._weight - a.square(),
            self._square_b / self._weight - b.square(),
        )


@dataclass(frozen=True)
class Meeting:
    """Joint moments of two models a and b on the same inputs.

    stream: of P x / |P x| over all depths, which so count the same; per layer: q, k and context
    (the heads' outputs), each a `Moments` with sites a and b; units: the MLPs'.
    """

    stream: Moments
    q: tuple[Moments, ...]
    k: tuple[Moments, ...]
    context: tuple[Moments, ...]
    units: tuple[Cross, ...]


def meet(
    anchor: tuple[nn.Module, Layout],
    other: tuple[nn.Module, Layout],
    batches: Iterable[Inputs],
    importance: Tensor | None = None,
) -> Meeting:
    """Return the joint moments of two models of one depth; keys are weighted alike everywhere.

    importance: (depths, tokens), what each token matters at each point of the stream.
    """

    def moments(path: str) -> Moments:
        a, b = (len(m.get_parameter(f"{path}.weight")) for m, _ in (anchor, other))
        return Moments(a=a, b=b)

    blocks = anchor[1].blocks
    met = Meeting(
        stream=moments(anchor[1].final_norm),
        q=tuple(moments(block.q) for block in blocks),
        k=tuple(moments(block.k) for block in blocks),
        context=tuple(moments(block.v) for block in blocks),
        units=tuple(Cross() for _ in blocks),
    )
    for batch in batches:
        pairs = zip(steps(*anchor, batch), steps(*other, batch), strict=True)
        for point, (a, b) in enumerate(pairs):
            weights = row_weights(importance, point, len(batch))
            met.stream.update(weights, a=direction(a.stream), b=direction(b.stream))
            layer = (point - 1) // 2
            if "units" in a.parts:
                met.units[layer].update(weights, a.parts["units"], b.parts["units"])
            elif a.parts:
                met.q[layer].update(weights, a=a.parts["q"], b=b.parts["q"])
                met.k[layer].update(None, a=a.parts["k"], b=b.parts["k"])
                met.context[layer].update(weights, a=a.parts["context"], b=b.parts["context"])
    return met
