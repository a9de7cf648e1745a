"""What stands behind the last stream: a pooler, where the class has one, and the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimfuse.families import Layout, Pooler
from slimfuse.fuse import walk
from slimfuse.fuse.fits import Groups, fit, statistics
from slimfuse.fuse.labels import Goals
from slimfuse.fuse.running import JUDGES, Running
from slimfuse.fuse.solve import decoder

if TYPE_CHECKING:
    from slimfuse.fuse.builder import Builder


def fit_head(builder: Builder, goals: Goals) -> None:
    """Fit the head to what `goals` makes of the parents' logits."""
    layout, union, run = builder.layout, builder.union, builder.run
    key = f"{layout.head}.weight"
    models = [parent.model for parent in union.parents]
    backs = None if layout.pooler is None else builder._fit_pooler(goals)
    shape, intercept = builder.target.get_parameter(key).shape, builder._biased(layout.head)
    sites = {f"n{p}": state[key].shape[1] for p, state in enumerate(union.states)}
    moments = builder._moments(goal=shape[0], t=shape[1], **sites)
    inputs, wanted = [], []
    for b in range(len(run.sizes)):
        tops = [
            walk.read_out(m, layout, x, run.masks[b])
            for m, x in zip(models, run.streams(b), strict=True)
        ]
        heads = zip(models, tops, strict=True)
        scores = [walk.apply(m, layout.head, top).double() for m, top in heads]
        wanted.append(goals(scores, [top.double() for top in tops]))
        inputs.append(run.top(b).double())
        moments.update(goal=wanted[-1], t=inputs[-1], **dict(zip(sites, tops, strict=True)))

    def back(p: int) -> Tensor:
        """Return how a parent's features are read from the target's (d_p, m)."""
        if backs is not None:
            return backs[p]
        gain = head_gain(union.states[p], layout, union.widths[p])
        return builder._readback(moments, p, p, gain, intercept=intercept)

    def prior() -> Tensor:
        total = torch.zeros(shape, dtype=torch.float64)
        for p, (places, weight) in enumerate(goals.shares):
            total[places] += weight * union.states[p][key].double() @ back(p)
        return total

    weight, bias = builder._held(layout.head, prior)
    stats = statistics(moments, "goal", "t", intercept=intercept)
    groups = _singles(run, inputs, wanted)
    found = fit(stats, weight, builder.settings.ridge, groups, bias, builder.ranks)
    builder._write(layout.head, found, len(layout.blocks), stats.variance)


def fit_pooler(builder: Builder, goals: Goals) -> list[Tensor]:
    """Fit the pooler to those of the parents' pooled units that explain their logits best.

    Returns how each parent's pooled units are read from the target's (d_p, m).
    """
    layout, union = builder.layout, builder.union
    assert layout.pooler is not None
    head = f"{layout.head}.weight"
    sizes = [state[head].shape[1] for state in union.states]
    out = torch.zeros(len(builder.target.get_parameter(head)), sum(sizes), dtype=torch.float64)
    columns = torch.arange(sum(sizes)).split(sizes)
    for (places, weight), state, own in zip(goals.shares, union.states, columns, strict=True):
        out[places[:, None], own] += weight * state[head].double()
    return _fit_pooled(builder, layout, layout.pooler, out)


def fit_unread(builder: Builder) -> None:
    """Fit the pooler that nothing reads to those of the parents' units that explain the rest."""
    layout, union = builder.layout, builder.union
    assert layout.unread is not None
    units = sum(len(state[f"{layout.unread.dense}.weight"]) for state in union.states)
    first = replace(layout, readout=0)
    _fit_pooled(builder, first, layout.unread, torch.eye(units, dtype=torch.float64))


def _fit_pooled(builder: Builder, layout: Layout, pooler: Pooler, out: Tensor) -> list[Tensor]:
    """Fit a pooler to the parents' units that explain what they give by `out` (k, Σ n) best."""
    union, run = builder.union, builder.run
    dense = f"{pooler.dense}.weight"
    sizes = [len(state[dense]) for state in union.states]
    sites = {f"n{p}": width for p, width in enumerate(union.widths)}
    units = builder._moments(all=sum(sizes))
    read = builder._moments(**sites, t=builder.shape.hidden_size)
    inputs, wanted = [], []
    for b in range(len(run.sizes)):
        models = [*(p.model for p in union.parents), builder.target]
        streams = [*run.streams(b), run.stream(b)]
        *seen, own = (
            walk.pooled(layout, walk.last_normed(model, layout, x), run.masks[b])
            for model, x in zip(models, streams, strict=True)
        )
        pairs = zip(union.parents, seen, strict=True)
        raw = torch.cat([walk.apply(p.model, pooler.dense, x) for p, x in pairs], dim=1)
        inputs.append(own.double())
        wanted.append(raw.double())
        units.update(all=pooler.activation(raw))
        read.update(t=inputs[-1], **dict(zip(sites, seen, strict=True)))
    cov = units.cov("all")
    push = builder._choose_pooled(cov, out, len(builder.target.get_parameter(dense)))

    def prior() -> Tensor:
        gains = [
            head_gain(state, layout, width)
            for state, width in zip(union.states, union.widths, strict=True)
        ]
        moved = [
            state[dense].double() @ builder._readback(read, p, p, gains[p])
            for p, state in enumerate(union.states)
        ]
        return push.T @ torch.cat(moved)

    both = builder._moments(goal=push.shape[1], t=builder.shape.hidden_size)
    goal = torch.cat(wanted) @ push
    both.update(goal=goal, t=torch.cat(inputs))
    weight, bias = builder._held(pooler.dense, prior)
    stats = statistics(both, "goal", "t")
    groups = _singles(run, inputs, goal.split(run.sizes))
    found = fit(stats, weight, builder.settings.ridge, groups, bias, builder.ranks)
    builder._write(pooler.dense, found, len(layout.blocks), stats.variance)
    return list(torch.split(decoder(cov, push), sizes))


def head_gain(state: Mapping[str, Tensor], layout: Layout, width: int) -> Tensor:
    """Return the gain of the final norm (d_p,), ones where there is none."""
    if layout.final_norm:
        return state[f"{layout.final_norm}.weight"]
    return torch.ones(width, dtype=torch.float64)


def _singles(run: Running, inputs: Sequence[Tensor], goals: Sequence[Tensor]) -> Groups:
    """Yield some sequences' rows, one each, for leaving out; inputs, goals: of every batch."""
    step = max(1, sum(run.every) // JUDGES)
    for b, (seen, wanted) in enumerate(zip(inputs, goals, strict=True)):
        chosen = (torch.arange(len(seen)) + run.first(b)) % step == 0
        few = seen[chosen]
        ones = torch.ones(len(few), dtype=torch.float64)
        yield from zip(few.split(1), wanted[chosen].split(1), ones.split(1), strict=True)
