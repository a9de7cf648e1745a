"""OT fusion of traceable nets, layer by layer (Singh & Jaggi, arXiv 1910.05653)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from slimfuse.errors import DataError, ParentError, ShapeError, UserError
from slimfuse.nets.costs import Traced, activation_costs, doubles, like, traced, weight_costs
from slimfuse.nets.graph import BATCH_NORMS, some
from slimfuse.spaces import transform
from slimfuse.transport import Solver, TransportMap, solve

CostKind = Literal["activations", "weights"]


@dataclass(frozen=True)
class NetFusion:
    """What a fusion did: for every net but the anchor, the map of each of its free spaces.

    weights: the shares of the average, in the parents' order, then a separate anchor's.
    """

    maps: tuple[Mapping[str, TransportMap], ...]
    weights: tuple[float, ...]


def fuse_nets(
    parents: Sequence[nn.Module],
    anchor: nn.Module | None,
    target: nn.Module,
    batches: Sequence[Tensor],
    *,
    solver: Solver | None = None,
    cost: CostKind = "activations",
    weights: Sequence[float] | None = None,
    recalibrate: bool = True,
) -> NetFusion:
    """Load into `target` the weighted average of the parents, each moved onto the anchor.

    For every free space, in execution order, a plan between a parent's n units and the anchor's
    m; writers move by its push, readers by its pull, so that parents of any widths fit.
    anchor: a trained net of the target's widths; None: the first parent, which is then not moved.
    batches: inputs of the net; the first is also traced. cost: "activations" compares the units'
    standardised pre-activations, "weights" the weights that write them (see `costs`); solver:
    default exact. weights: of the parents, then of a separate anchor (default equal).
    recalibrate: re-estimate BatchNorm's running statistics on `batches` (nothing without one).
    Raises ParentError when the nets differ in more than widths or can't be traced, ShapeError when
    `target` has not the anchor's shape, DataError without batches.
    """
    if not parents or not batches:
        raise DataError(
            "fusing needs a parent and a batch of inputs",
            got=f"{len(parents)} parents, {len(batches)} batches",
        )
    base = parents[0] if anchor is None else anchor
    others = parents[1:] if anchor is None else parents
    shares = _shares(weights, len(others) + 1)
    _same_shapes([base, target], "the target has not the anchor's shape")
    ours = traced(base, batches[0][:2])
    moved = [traced(net, batches[0][:2]) for net in others]
    for number, one in enumerate(moved, start=2 if anchor is None else 1):
        _alike(one, ours, f"parent {number}")
    costs = activation_costs(moved, ours, batches) if cost == "activations" else None
    results: list[dict[str, TransportMap]] = []
    for i, one in enumerate(moved):
        maps: dict[str, TransportMap] = {}
        for space in one.graph.atlas.free:
            found = costs[i][space] if costs else weight_costs(one, ours, space, maps)
            try:
                maps[space] = solve(found, solver=solver or Solver())
            except ValueError as error:
                raise UserError(
                    f"the transport plan of {space} can't be solved as asked",
                    where="fuse.ot",
                    got=str(error),
                    hint="ask for other effective_units, or give reg",
                ) from error
        results.append(maps)
    # an anchor of its own comes last in the shares, a parent that serves as one first
    at = 0 if anchor is None else len(others)
    fused = {k: shares[at] * v for k, v in ours.state.items()}
    for share, one, maps in zip(shares[:at] + shares[at + 1 :], moved, results, strict=True):
        for name, value in transform(one.state, one.graph.atlas, maps).items():
            fused[name] += share * value.to(fused[name].device)
    _load(target, base, fused)
    if recalibrate:
        reestimate(target, batches)
    return NetFusion(tuple(results), shares)


def vanilla(
    parents: Sequence[nn.Module], target: nn.Module, weights: Sequence[float] | None = None
) -> None:
    """Load the plain weighted average of the parents into `target`.

    Raises ShapeError when their shapes differ.
    """
    _same_shapes([*parents, target], "a plain average needs equal shapes")
    shares = _shares(weights, len(parents))
    states = [doubles(net) for net in parents]
    fused = {k: _mean(shares, [s[k] for s in states]) for k in states[0]}
    _load(target, parents[0], fused)


@torch.no_grad()
def reestimate(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set BatchNorm's running statistics to their means over `batches`.

    Averaged units vary less than their parents' did, and moved statistics don't show it: REPAIR
    (Jordan et al., arXiv 2211.08403). Nets without BatchNorm stay as they are.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    try:
        for batch in batches:
            model(like(model, batch))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(given) != count or min(given) < 0 or not sum(given) > 0:
        raise ParentError(
            "these weights don't fit the nets",
            got=given,
            allowed=f"{count} weights (parents, then a separate anchor), none below 0, not all 0",
        )
    return tuple(w / sum(given) for w in given)


def _mean(shares: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * p for w, p in zip(shares, parts, strict=True)]).sum(0)


def _same_shapes(nets: Sequence[nn.Module], what: str) -> None:
    first, *rest = [{k: tuple(v.shape) for k, v in n.state_dict().items()} for n in nets]
    gaps = [
        f"{k}: {first.get(k, 'missing')} and {other.get(k, 'missing')}"
        for other in rest
        for k in [*first, *(k for k in other if k not in first)]
        if first.get(k) != other.get(k)
    ]
    if gaps:
        raise ShapeError(
            what,
            got=some(gaps),
            hint="OT fusion with a trained net of the target's shape as anchor takes any widths",
        )


def _alike(one: Traced, base: Traced, where: str) -> None:
    """Raise ParentError unless two nets differ in nothing but the sizes of their free spaces."""
    axes, ours = one.graph.atlas.axes, base.graph.atlas.axes
    gaps = [k for k in axes.keys() | ours.keys() if axes.get(k) != ours.get(k)]
    gaps += [
        f"{space.name}: {space.size} and {base.size(space.name)}"
        for space in one.graph.atlas.spaces.values()
        if not gaps and space.kind == "fixed" and space.size != base.size(space.name)
    ]
    if not gaps and one.graph.writers != base.graph.writers:
        gaps.append("the order of the layers, or which are followed by BatchNorm")
    if gaps:
        raise ParentError(
            "these nets differ in more than the widths of their hidden layers",
            where=f"{where} and the anchor",
            got=some(sorted(gaps)),
        )


def _load(target: nn.Module, base: nn.Module, fused: Mapping[str, Tensor]) -> None:
    target.load_state_dict({**base.state_dict(), **fused})  # strict; counters are the anchor's
    target.eval()
