"""Costs between the units of two nets of one kind: from their activations or their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.moments import Moments
from slimfuse.nets.graph import (
    BATCH_NORMS,
    CONVOLUTIONS,
    TRANSPOSED,
    Graph,
    Writer,
    floating,
    graph_of,
)
from slimfuse.spaces import Role, transform
from slimfuse.transport import TransportMap, standardised_cost, weight_cost

CHANNELS_FIRST = (*CONVOLUTIONS, *TRANSPOSED, *BATCH_NORMS)


@dataclass(frozen=True)
class Traced:
    """A net with its graph and its float64 state (all that the atlas covers)."""

    net: nn.Module
    graph: Graph
    state: Mapping[str, Tensor]

    def size(self, space: str) -> int:
        """Return the number of units of a space."""
        return self.graph.atlas.spaces[space].size

    @property
    def sites(self) -> dict[str, list[str]]:
        """The modules whose outputs are the pre-activations of every free space."""
        return {space: [w.site for w in ws] for space, ws in self.graph.writers.items()}


def traced(net: nn.Module, example: Tensor) -> Traced:
    """Return a net with its graph, traced on a batch `example`; raises ParentError."""
    return Traced(net, graph_of(net, like(net, example)), doubles(net))


def doubles(net: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and floating buffers in float64."""
    return {k: v.detach().double() for k, v in floating(net.state_dict()).items()}


def like(net: nn.Module, batch: Tensor) -> Tensor:
    """Return a batch on the net's device and, where it is floating, in its precision."""
    first = next(net.parameters())
    return batch.to(first.device, first.dtype if batch.is_floating_point() else None)


@torch.no_grad()
def activation_costs(
    moved: Sequence[Traced], base: Traced, batches: Sequence[Tensor]
) -> list[dict[str, Tensor]]:
    """Return for every moved net the cost (n, m) of every free space, in one pass over `batches`.

    2(1 - ρ) of the pre-activations over samples and positions. Where a space has several writers
    (a residual stream) their covariances are added up: its units are what they write together.
    """
    seen: list[dict[str, list[Moments]]] = [
        {
            space: [Moments(net=one.size(space), base=base.size(space)) for _ in sites]
            for space, sites in base.sites.items()
        }
        for one in moved
    ]
    for batch in batches:
        ours = _features(base, batch)
        for one, moments in zip(moved, seen, strict=True):
            theirs = _features(one, batch)
            for space, several in moments.items():
                for site, each in zip(base.sites[space], several, strict=True):
                    each.update(net=theirs[site], base=ours[site])
    return [{space: _pooled(several) for space, several in found.items()} for found in seen]


def _pooled(several: Sequence[Moments]) -> Tensor:
    def total(a: str, b: str) -> Tensor:
        return torch.stack([m.cov(a, b) for m in several]).sum(0)

    return standardised_cost(
        total("net", "base"), total("net", "net").diagonal(), total("base", "base").diagonal()
    )


def _features(one: Traced, batch: Tensor) -> dict[str, Tensor]:
    """Return the float64 output rows (samples · positions, units) of every site."""
    rows: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(module, CHANNELS_FIRST):
            output = output.movedim(1, -1)
        # copied at once: an activation may overwrite it in place
        rows[name] = output.to(torch.float64, copy=True).reshape(-1, output.shape[-1])

    with _hooked(one.net, {name: partial(keep, name) for s in one.sites.values() for name in s}):
        one.net.eval()(like(one.net, batch))
    return rows


@contextmanager
def _hooked(net: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    handles = [net.get_submodule(k).register_forward_hook(h) for k, h in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weight_costs(one: Traced, base: Traced, space: str, maps: Mapping[str, TransportMap]) -> Tensor:
    """Return the cost (n, m) of a space from the weights that write its units.

    maps: those of the spaces before it, which have already moved the columns. Of the writers of a
    residual stream only those count whose inputs have been moved: the stem, and what follows.
    """
    writers = [
        w
        for w in base.graph.writers[space]
        if all(
            leg.space in maps
            for axis in base.graph.atlas.axes[f"{w.module}.weight"]
            for leg in axis
            if leg.role is Role.READ
        )
    ]
    assert writers, "the first writer of a space reads what was written before"
    cost: Tensor = weight_cost(_rows(one, space, writers, maps), _rows(base, space, writers, {}))
    return cost


def _rows(
    one: Traced, space: str, writers: Sequence[Writer], maps: Mapping[str, TransportMap]
) -> Tensor:
    """Return what each unit is written by: (units, weights and biases of `writers`)."""
    parts = []
    for writer in writers:
        name = f"{writer.module}.weight"
        axes = one.graph.atlas.axes[name]
        dim = next(i for i, axis in enumerate(axes) if any(leg.space == space for leg in axis))
        moved = transform(one.state, one.graph.atlas, maps, only=[name])[name]
        rows = moved.movedim(dim, 0).flatten(1)
        bias = one.state.get(f"{writer.module}.bias", torch.zeros_like(rows[:, 0]))
        parts += list(_folded(one, writer.norm, rows, bias) if writer.norm else (rows, bias))
    return torch.cat([p.reshape(len(p), -1) for p in parts], dim=1).cpu()


def _folded(one: Traced, norm: str, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and biases as a BatchNorm in evaluation mode scales and shifts them."""
    ones = torch.ones_like(bias)
    eps: Any = one.net.get_submodule(norm).eps
    deviation = (one.state.get(f"{norm}.running_var", ones) + eps).sqrt()
    gain = one.state.get(f"{norm}.weight", ones) / deviation
    mean, shift = (one.state.get(f"{norm}.{k}", 0 * ones) for k in ("running_mean", "bias"))
    return rows * gain[:, None], (bias - mean) * gain + shift
