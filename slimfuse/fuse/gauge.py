"""Averaging of models of one shape in common coordinates (fusion.md §8)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches
from slimfuse.errors import ParentError
from slimfuse.families import Family
from slimfuse.fuse.canonical import State, canonical, check_symmetry, write
from slimfuse.fuse.gauge_maps import Alignment, Match, assign, gauge_maps, match_maps
from slimfuse.fuse.gauge_stats import meet
from slimfuse.fuse.plans import planned
from slimfuse.fuse.union import Parent
from slimfuse.spaces import AxisMap, transform
from slimfuse.transport import Solver, solve

SOFT_UNITS = 8.0  # plans of fewer units converge slowly
Mode = Literal["none", "permutation", "soft", "gauge"]


class Weighted(Protocol):
    """A trained model and its share of the average (`fuse.union.Parent`)."""

    @property
    def model(self) -> nn.Module:
        """The model; it is only read."""

    @property
    def weight(self) -> float:
        """Its share, relative to the other parents'."""


def align(
    anchor: nn.Module,
    other: nn.Module,
    family: Family,
    batches: Batches,
    *,
    importance: Tensor | None = None,
) -> tuple[State, Alignment]:
    """Return `other`'s canonical float64 parameters in `anchor`'s gauge; its function stays.

    Both models have one shape. The whole symmetry of the class is used (`gauge_maps`), so that
    `other`'s logits change by rounding only. importance: (depths, tokens), see `meet`. Raises
    ParentError for models whose symmetry isn't known or whose shapes differ.
    """
    layout = family.layout(anchor.config)
    _check_shapes(anchor, other, family)
    a, b = canonical(anchor, family), canonical(other, family)
    with torch.no_grad():
        met = meet((anchor, layout), (other, layout), batches(), importance)
    found = gauge_maps(met, a, b, layout, family.head_dims(anchor.config))
    return transform(b, family.atlas(anchor.config), found.maps), found


def aligned(
    parents: Sequence[Parent], family: Family, batches: Batches, importance: Tensor | None = None
) -> list[Parent]:
    """Return the parents as canonical models in the first one's gauge (`align`).

    Their functions stay.
    """
    anchor, *others = parents
    first = family.build(anchor.model.config).to(next(anchor.model.parameters()).dtype)
    write(first, canonical(anchor.model, family))
    found = [Parent(anchor.name, first, anchor.weight)]
    for other in others:
        state, _ = align(anchor.model, other.model, family, batches, importance=importance)
        model = family.build(other.model.config).to(next(other.model.parameters()).dtype)
        write(model, state)
        found.append(Parent(other.name, model, other.weight))
    return found


def average(
    parents: Sequence[Weighted],
    target: nn.Module,
    family: Family,
    batches: Batches,
    *,
    alignment: Mode = "gauge",
    solver: Solver | None = None,
    importance: Tensor | None = None,
) -> list[Alignment]:
    """Write the weighted mean of the parents' parameters into `target`, aligned to the first.

    parents and target have one shape; batches gives the same unlabelled inputs each time.
    alignment: "gauge" (canonical form, whole symmetry); the controls of published work, on the
    parameters as they are: "none", "permutation" (units to units, exact transport) and "soft"
    (transport by `solver`, default entropic with 8 units of a parent per unit of the anchor's, or
    what the space allows; writers move by push, readers by pull). Returns one alignment
    for each further parent, none for "none". Source: fusion.md §8; arXiv 2310.05719, 1910.05653.
    """
    anchor, *others = (p.model for p in parents)
    for model in (*others, target):
        _check_shapes(anchor, model, family)
    layout, atlas = family.layout(anchor.config), family.atlas(anchor.config)
    dims = family.head_dims(anchor.config)
    match: Match = assign if alignment == "permutation" else partial(_soft, solver)
    found: list[Alignment] = []
    states = [canonical(anchor, family) if alignment == "gauge" else _float64(anchor)]
    for other in others:
        if alignment == "gauge":
            state, how = align(anchor, other, family, batches, importance=importance)
            found.append(how)
        else:
            state = _float64(other)
            if alignment != "none":
                check_symmetry(other, layout)
                with torch.no_grad():
                    met = meet((anchor, layout), (other, layout), batches(), importance)
                found.append(match_maps(met, states[0], state, layout, dims, match))
                state = transform(state, atlas, found[-1].maps)
        states.append(state)
    total = sum(p.weight for p in parents)
    mean = {
        name: sum(
            (s[name] * (p.weight / total) for s, p in zip(states, parents, strict=True)),
            torch.zeros((), dtype=torch.float64),
        )
        for name in atlas.axes
    }
    write(target, mean)
    return found


def _soft(solver: Solver | None, similarity: Tensor) -> AxisMap:
    cost = 2 * (1 - similarity)
    if solver is not None:
        return planned("an alignment", cost, solver)
    softest = len(similarity) - 0.5  # at n units the plan is uniform, which no regulariser gives
    if min(SOFT_UNITS, softest) <= 1:
        return assign(similarity)
    return solve(cost, solver=Solver("sinkhorn", effective_units=min(SOFT_UNITS, softest)))


def _float64(model: nn.Module) -> State:
    return {name: p.detach().cpu().double() for name, p in model.named_parameters()}


def _check_shapes(anchor: nn.Module, other: nn.Module, family: Family) -> None:
    a, b = (family.shape(m.config) for m in (anchor, other))
    if a != b:
        raise ParentError(
            "only models of one shape can be averaged",
            where="parents",
            got=str(b),
            allowed=str(a),
            hint="reduce the wider parent first, or use the refit, which takes any widths",
        )
