"""The head that reads every token: logits over a vocabulary, of which none are kept."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimfuse.errors import ParentError
from slimfuse.fuse import walk
from slimfuse.fuse.fits import Fit, Statistics, centre, fit, spread
from slimfuse.fuse.labels import Goals, MeanLogits
from slimfuse.fuse.readout import head_gain
from slimfuse.fuse.solve import RANK_TOLERANCE, ridge, roots
from slimfuse.fuse.tables import centred_gram, slices
from slimfuse.moments import Moments
from slimfuse.spaces import LinearMap, transform

if TYPE_CHECKING:
    from slimfuse.fuse.builder import Builder


def fit_vocabulary(builder: Builder, goals: Goals) -> None:
    """Fit the head to the parents' mean logits Σ_p W_p n_p, with n_p = w_p · their features.

    The mean is linear in the features, and so is a ridge in its goals: W = Σ_p W_p X_p with X the
    ridge of the features (Σ d_p) on the target's. What it misses of the centred logits is
    |G^½ (n - X t)|², G = WᵀPW over all heads side by side, so strengths are judged exactly without
    a logit, by whole sequences as elsewhere. All real tokens count the same. A tied head: `_tie`.
    Raises ParentError for other goals than the mean.
    """
    if not isinstance(goals, MeanLogits):
        raise ParentError(
            "heads over a vocabulary follow the mean of their parents' logits only",
            got=type(goals).__name__,
            hint="give parents of one vocabulary",
        )
    layout, union, run = builder.layout, builder.union, builder.run
    last, tied = 2 * len(layout.blocks), layout.tied
    intercept = builder._biased(layout.head) and not tied
    heads = [state[f"{layout.head}.weight"] for state in union.states]
    sizes = [head.shape[1] for head in heads]
    shares = torch.tensor([float(w) for _, w in goals.shares], dtype=torch.float64)
    scale = shares.repeat_interleave(torch.tensor(sizes))
    sites = {f"n{p}": size for p, size in enumerate(sizes)}
    moments = builder._moments(**sites, t=builder.shape.hidden_size)
    width = sum(moments.widths.values())

    def inputs(batch: int, places: Tensor) -> Tensor:
        return walk.read_out(builder.target, layout, run.stream(batch))[places].double()

    def features(batch: int, places: Tensor) -> list[Tensor]:
        pairs = zip(union.parents, run.streams(batch), strict=True)
        return [walk.read_out(p.model, layout, x)[places] for p, x in pairs]

    for b in range(len(run.sizes)):
        places, weights = builder.draw(last, b, width, "even")
        seen = dict(zip(sites, features(b, places), strict=True))
        moments.update(weights, t=inputs(b, places), **seen)

    def readbacks() -> Tensor:
        gains = [head_gain(s, layout, d) for s, d in zip(union.states, sizes, strict=True)]
        backs = [
            builder._readback(moments, p, p, gain, intercept=intercept)
            for p, gain in enumerate(gains)
        ]
        return scale[:, None] * torch.cat(backs)

    own = [builder.target.get_parameter(f"{layout.head}.weight")] if tied else []
    grams = centred_gram([*own, *heads])
    few = grams.shape[0] - sum(sizes)  # the tied table's columns, if there is one
    outer = grams[few:, few:]
    root = roots(outer)[0]
    prior = builder._held_features(readbacks)
    cross = torch.cat([spread(moments, site, "t", intercept=intercept) for site in sites])
    cross = scale[:, None] * cross
    mean = scale * torch.cat([centre(moments, site, intercept=intercept) for site in sites])
    stats = Statistics(
        root @ cross,
        spread(moments, "t", intercept=intercept),
        centre(moments, "t", intercept=intercept),
        root @ mean,
        float((outer * _joint(moments, list(sites), scale, intercept=intercept)).sum()),
        moments.weight,
        intercept,
    )

    def wanted(batch: int, places: Tensor) -> Tensor:
        return (torch.cat(features(batch, places), dim=1).double() * scale) @ root

    groups = run.judges(last, width, inputs, wanted, "even")
    found = fit(stats, root @ prior, builder.settings.ridge, groups)
    if tied:
        _tie(builder, stats, found, prior, grams[:few, :few], grams[:few, few:] @ cross)
        return
    read = prior
    if isinstance(found.strength, float) and isfinite(found.strength):
        read = ridge(cross, stats.gram, prior, found.strength)
    builder._note(layout.head, found, len(layout.blocks), stats.variance)
    head = builder.target.get_submodule(layout.head)
    assert isinstance(head.weight, Tensor)
    offset = mean - read @ stats.mean_in
    for part in slices(len(head.weight)):
        table = torch.cat([weight[part].double() for weight in heads], dim=1)
        head.weight[part] = table @ read
        if isinstance(head.bias, Tensor):
            biases = [state[f"{layout.head}.bias"][part].double() for state in union.states]
            head.bias[part] = table @ offset + shares @ torch.stack(biases)


def _joint(moments: Moments, sites: list[str], scale: Tensor, *, intercept: bool) -> Tensor:
    """Return the joint spread of all sites, scaled."""
    whole = [torch.cat([spread(moments, a, b, intercept=intercept) for b in sites], 1)
             for a in sites]  # fmt: skip
    return scale[:, None] * torch.cat(whole) * scale


def _tie(
    builder: Builder, stats: Statistics, free: Fit, prior: Tensor, outer: Tensor, aim: Tensor
) -> None:
    """Fit what stands between a tied table and the stream: the final norm's gain.

    The table E already writes the first stream, so that of the head only E S t is free, with S the
    diagonal of the gain. Under RMSNorm a stream may be turned, once its norms' gains are in the
    readers: then S is any symmetric matrix Q diag(g) Qᵀ, the whole target is turned by Q, and g is
    the gain. A single parent's own head is E diag(γ) and moves exactly where the stream keeps its
    width. A narrower one loses what of the parents' head lies outside the span of E: an untied
    head is W X with X (d, m) free. The normal equations A S C + S C A = N + Nᵀ, A = EᵀPE, C = E[t
    tᵀ], N = EᵀP E[goal tᵀ] fall apart in the basis that makes C one and A diagonal. The ridge is
    the free head's (`free`), about the transported gains. Under LayerNorm, whose gain holds the
    channels in place, S is diagonal.

    outer: A (m, m); aim: N (m, m).
    """
    layout, shares = builder.layout, [len(back) for back in builder.readbacks]
    assert layout.final_norm and not builder.norms_stay, "a tied head is fitted by its norm's gain"
    parts = zip(builder.readbacks, prior.split(shares), strict=True)
    start = torch.stack([back.T @ read for back, read in parts]).sum(0)
    start = (start + start.T) / 2
    strength = free.strength if isinstance(free.strength, float) else float("inf")
    turned = builder.union.rms and builder.turns
    if turned:
        middle = _symmetric(outer, stats.gram, aim, start, strength)
        gain, rotation = torch.linalg.eigh(middle)
        _turn(builder, rotation)
    else:
        gain = _diagonal(outer, stats.gram, aim, start.diagonal(), strength)
        middle = gain.diag()
    told = (middle @ outer @ middle * stats.gram).sum()
    missed = stats.variance - 2 * (middle * aim).sum() + told
    norm = builder.target.get_submodule(layout.final_norm)
    assert isinstance(norm.weight, Tensor)
    norm.weight.copy_(gain)
    found = Fit(middle, torch.zeros_like(gain), float(missed), strength)
    builder._note(layout.head, found, len(layout.blocks), stats.variance)


def _symmetric(a: Tensor, c: Tensor, aim: Tensor, start: Tensor, strength: float) -> Tensor:
    """Return the symmetric S that minimises tr(S A S C) - 2 tr(S N) with a ridge about `start`."""
    if not isfinite(strength):
        return start
    eye = torch.eye(len(c), dtype=c.dtype)
    lower = torch.linalg.cholesky(c + max(strength, RANK_TOLERANCE) * c.diagonal().mean() * eye)
    left = aim - a @ start @ c
    half = torch.linalg.solve_triangular(lower, eye, upper=False)
    values, basis = torch.linalg.eigh(half @ a @ half.T)
    basis = half.T @ basis  # basisᵀ C basis = 1, basisᵀ A basis = values
    sums = values[:, None] + values
    seen = sums > RANK_TOLERANCE * sums.max()
    inner = basis.T @ (left + left.T) @ basis / torch.where(seen, sums, 1)
    step: Tensor = basis @ torch.where(seen, inner, 0) @ basis.T
    return start + (step + step.T) / 2


def _diagonal(a: Tensor, c: Tensor, aim: Tensor, start: Tensor, strength: float) -> Tensor:
    """Return the gains g that minimise tr(D A D C) - 2 tr(D N), D = diag(g), about `start`."""
    if not isfinite(strength):
        return start
    return ridge(aim.diagonal()[None], a * c, start[None], strength)[0]


def _turn(builder: Builder, rotation: Tensor) -> None:
    """Turn the target's stream by an orthogonal matrix; its norms' gains are one."""
    atlas, space = builder.atlas, builder.layout.stream_space
    maps = {space: LinearMap(rotation, rotation)}
    kept = {f"{path}.weight" for path in builder._norms()}
    for name, value in builder.target.named_parameters():
        if name in kept or not any(leg.space == space for axis in atlas.axes[name] for leg in axis):
            continue
        for part in builder._parts(name):
            moved = transform({name: value[part].double()}, atlas, maps, only=[name])
            value[part] = moved[name]
    builder.rotation = rotation
