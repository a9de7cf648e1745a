"""A block's layers, each by its own least squares: what reads the stream, what writes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimfuse.batch import Inputs
from slimfuse.families import Block
from slimfuse.fuse import walk
from slimfuse.fuse.choice import Choice
from slimfuse.fuse.fits import Statistics, centre, fit, spread, statistics
from slimfuse.fuse.sandwich import Sandwich
from slimfuse.fuse.solve import decoder
from slimfuse.fuse.stream import centring
from slimfuse.fuse.union import Member
from slimfuse.fuse.walk import flat, rows
from slimfuse.moments import Moments, precision
from slimfuse.spaces import LinearMap, transform

if TYPE_CHECKING:
    from slimfuse.fuse.builder import Builder


def fit_projection(builder: Builder, batches: Sequence[Inputs]) -> None:
    """Fit what writes the first stream from embeddings that are the first parent's own.

    The prior is that parent's layer, scaled for the share that the others have in the stream.
    """
    layout, name = builder.layout, builder.layout.projection
    width, inner = builder.target.get_parameter(f"{name}.weight").shape
    moments = builder._moments(goal=width, t=inner)
    for b, batch in enumerate(batches):
        with walk.watch(builder.target, t=name) as seen:
            walk.start(builder.target, layout, batch)
        builder.run.cache.put("u", b, seen["t"])
        places, weights = builder.draw(0, b, width + inner)
        moments.update(weights, goal=builder._mixed(b, places), t=flat(seen["t"], places))

    def inputs(batch: int, places: Tensor) -> Tensor:
        return rows(builder.run.cache.get("u", batch), places)

    def transported() -> Tensor:
        own = builder.mixes[0] @ builder.union.states[0][f"{name}.weight"].double()
        energy = (own @ moments.cov("t") * own).sum().clamp_min(1e-30)
        return own * ((moments.cov("goal", "t") * own).sum() / energy)

    prior, bias = builder._held(name, transported)
    stats = statistics(moments, "goal", "t")
    groups = builder.run.judges(0, width + inner, inputs, builder._mixed)
    found = fit(stats, prior, builder.settings.ridge, groups, bias, builder.ranks)
    builder._write(name, found, -1, stats.variance)
    for b in range(len(builder.run.sizes)):
        builder.run.cache.drop("u", b)


def fit_reader(
    builder: Builder,
    index: int,
    part: str,
    norm: str,
    members: Sequence[Member],
    choice: Choice,
    moments: Moments,
    checkpoint: int,
) -> None:
    """Fit a layer that reads the stream to the chosen units' pre-activations.

    Without a bias to fit, moments are about zero; a LayerNorm's shift of ones then stands for one
    (see `Builder.attention`).
    """
    layout, union = builder.layout, builder.union
    block = layout.blocks[index]
    name: str = getattr(block, part)
    factors = _head_gains(builder, block, part, members, choice)
    weights, shifts = [], []
    for i, member in enumerate(members):
        state, atlas = union.states[member.parent], union.atlases[member.parent]
        path: str = getattr(union.block(member), part)
        names = [n for n in (f"{path}.weight", f"{path}.bias") if n in atlas.axes]
        moved = transform({n: state[n].double() for n in names}, atlas, choice.maps[i], only=names)
        scale = builder.query_scales[member.parent] if part == "q" else 1.0
        weight, *own = (moved[n] * scale for n in names)
        if factors is not None:
            weight, own = factors[i][:, None] * weight, [factors[i] * b for b in own]
        weights.append(weight)
        shifts += own
    sites = [f"n{i}" for i in range(len(members))]
    means = [w @ moments.mean(site) for site, w in zip(sites, weights, strict=True)]
    intercept = bool(shifts)
    shifted = not intercept and layout.norm == "layer"

    def transported() -> Tensor:
        centred = intercept or shifted
        return total(
            weights[i]
            @ builder._readback(moments, i, m.parent, union.gain(m, norm), intercept=centred)
            for i, m in enumerate(members)
        )

    prior, bias = builder._held(name, transported)
    if shifted:
        ones = torch.ones(prior.shape[1], dtype=torch.float64) / prior.shape[1]
        prior = prior @ centring(prior.shape[1])
        prior += torch.outer(total(means) - prior @ moments.mean("t"), ones)
    stats = Statistics(
        cross=total(
            w @ spread(moments, s, "t", intercept=intercept)
            for s, w in zip(sites, weights, strict=True)
        ),
        gram=spread(moments, "t", intercept=intercept),
        mean_in=centre(moments, "t", intercept=intercept),
        mean_goal=total(means + shifts) if intercept else torch.zeros(len(prior)).double(),
        variance=float(total(
            (a @ spread(moments, s, t, intercept=intercept) * b).sum()
            for s, a in zip(sites, weights, strict=True)
            for t, b in zip(sites, weights, strict=True)
        )),
        weight=moments.weight,
        intercept=intercept,
    )  # fmt: skip
    shift = total(shifts) if shifts else torch.zeros(())

    def goals(batch: int, places: Tensor) -> Tensor:
        seen = builder.run.normed(members, norm, batch)
        pairs = zip(seen, weights, strict=True)
        return shift + total(product(flat(x, places), w) for x, w in pairs)

    def inputs(batch: int, places: Tensor) -> Tensor:
        return rows(builder.run.own(getattr(block, norm), batch), places)

    width = sum(moments.widths.values())
    groups = builder.run.judges(checkpoint, width, inputs, goals, "reading")
    found = fit(stats, prior, builder.settings.ridge, groups, bias, builder.ranks)
    builder._write(name, found, index, stats.variance, part, choice)


def _head_gains(
    builder: Builder, block: Block, part: str, members: Sequence[Member], choice: Choice
) -> list[Tensor] | None:
    """Set the gain of the target's queries' or keys' norm; return the units' factors (n,) for it.

    None where there is no such norm. All heads of a layer share one gain γ, which heads of several
    layers bring: it is the root mean square of theirs, and a head with the gain γ_h is fitted to
    (γ_h / γ) q, so that what its norm makes of it keeps its direction.
    """
    path = {"q": block.q_norm, "k": block.k_norm}.get(part, "")
    if not path:
        return None
    union = builder.union
    gains, counts = [], []
    for member, maps in zip(members, choice.maps, strict=True):
        own = union.block(member)
        norm = own.q_norm if part == "q" else own.k_norm
        gains.append(union.states[member.parent][f"{norm}.weight"].double())
        found = maps[own.head_space]
        assert isinstance(found, LinearMap)
        counts.append(found.push.sum())
    shares = torch.stack(counts)[:, None] / torch.stack(counts).sum()
    each = torch.stack(gains)
    signs = torch.where((shares * each).sum(0) < 0, -1.0, 1.0).double()
    gain = signs * (shares * each.square()).sum(0).sqrt()
    builder.target.get_parameter(f"{path}.weight").copy_(gain)
    ratios = torch.where(gain == 0, 1.0, each / torch.where(gain == 0, 1.0, gain))
    heads = len(builder.target.get_parameter(f"{getattr(block, part)}.weight")) // len(gain)
    return [ratio.repeat(heads) for ratio in ratios]


def fit_writer(
    builder: Builder,
    index: int,
    part: str,
    members: Sequence[Member],
    choice: Choice,
    seen: Moments,
) -> None:
    """Fit a layer that writes the stream to what is missing there: E y_after - z_before.

    seen: moments of all the members' units. In a post-norm target see `post_norm`, where the
    branch has a norm of its own `sandwich`.
    """
    layout, run, union = builder.layout, builder.run, builder.union
    block, cache = layout.blocks[index], run.cache
    name: str = getattr(block, part)
    intercept = builder._biased(name)
    checkpoint = 2 * index + (1 if part == "o" else 2)
    bread = Sandwich(builder, index, part, members) if block.post(part) else None
    norm = layout.norm_at(checkpoint)
    if union.post_norm:
        builder.sums.aim(norm)
    inner = choice.push.shape[1]

    def divided(units: Tensor, batch: int, places: Tensor) -> Tensor:
        some = flat(units, places)
        return some if bread is None else some / flat(bread.scale(batch), places)

    def inputs(batch: int, places: Tensor) -> Tensor:
        return divided(cache.get("u", batch), batch, places).double()

    width = builder.shape.hidden_size
    moments = builder._moments(goal=width, t=inner, y=width)
    width = sum(moments.widths.values())
    for b in range(len(run.sizes)):
        if part == "down":
            units = walk.mlp(builder.target, block, run.stream(b))[0]
        else:
            units = run.heads(index, b)
        cache.put("u", b, units)
        places, weights = builder.draw(checkpoint, b, width)
        y = builder._mixed(b, places)
        goal = builder._missing(b, places, y)
        moments.update(weights, goal=goal, t=divided(units, b, places), y=y)

    def transported() -> Tensor:
        read = decoder(spread(seen, "all", intercept=intercept), choice.push)
        sizes = union.units(members, "q" if part == "o" else "up")
        if bread is not None:
            read = bread.readbacks(read, choice.push, sizes)
        parts = torch.split(read, sizes)
        maps, names = [], []
        for member, share in zip(members, parts, strict=True):
            own = union.block(member)
            spaces = (own.head_space, own.group_space, own.vo_space)
            space = " ".join(s for s in spaces if s) if part == "o" else own.mlp_space
            maps.append({space: LinearMap(share, share)})
            names.append(f"{getattr(own, part)}.weight")
        gains = [union.post_gain(m, part) for m in members]
        return builder._transported(members, names, maps, gains=gains)

    prior, bias = builder._held(name, transported)
    stats = statistics(moments, "goal", "t", intercept=intercept)
    groups = run.judges(checkpoint, width, inputs, builder._missing)
    found = fit(stats, prior, builder.settings.ridge, groups, bias, builder.ranks)
    if bread is not None:
        found = replace(found, weight=bread.settle(found.weight, checkpoint))
    builder._write(name, found, index, stats.variance, part)
    for b in range(len(run.sizes)):
        run.advance(block, part, b, cache.get("u", b))
        cache.drop("u", b)
    missed = share_of(found.missed, float(spread(moments, "y", intercept=intercept).trace()))
    settled = builder.sums.settle(norm, checkpoint) if union.post_norm else missed
    builder.stream_errors.append(settled)


def total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of equal shapes."""
    return torch.stack(tuple(parts)).sum(0)


def share_of(part: float, whole: float) -> float:
    """Return part / whole, nought of nothing."""
    return max(part, 0.0) / whole if whole > 0 else 0.0


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return float64 rows x Wᵀ; of wide float32 rows the product is float32."""
    kind = precision(x.shape[1], x.dtype)
    return (x.to(kind) @ weight.to(kind).T).double()
