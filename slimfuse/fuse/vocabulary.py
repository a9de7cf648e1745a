"""The head that reads every token: logits over a vocabulary, of which none are kept."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimfuse.fuse import walk
from slimfuse.fuse.fits import Statistics, centre, fit, spread
from slimfuse.fuse.labels import Goals, mean_shares
from slimfuse.fuse.readout import head_gain
from slimfuse.fuse.solve import ridge, roots
from slimfuse.fuse.stream import centring
from slimfuse.fuse.tables import centred_gram, slices
from slimfuse.fuse.tied import Tables, tie
from slimfuse.moments import Moments

if TYPE_CHECKING:
    from slimfuse.fuse.builder import Builder


def fit_vocabulary(builder: Builder, goals: Goals) -> None:
    """Fit the head to the parents' mean logits Σ_p W_p n_p, with n_p = w_p · their features.

    The mean is linear in the features, and so is a ridge in its goals: W = Σ_p W_p X_p with X the
    ridge of the features (Σ d_p) on the target's. What it misses of the centred logits is
    |G^½ (n - X t)|², G = WᵀPW over all heads side by side, so strengths are judged exactly without
    a logit, by whole sequences as elsewhere. All real tokens count the same. A tied head: `tied`.
    Without a bias of the head, a LayerNorm's shift of ones stands for it: what it normalises is
    orthogonal to them.
    Raises ParentError for other goals than the mean.
    """
    layout, union, run = builder.layout, builder.union, builder.run
    last, tied = 2 * len(layout.blocks), layout.tied
    shifted = layout.norm == "layer" and not builder._biased(layout.head)
    shifted = shifted and not builder.norms_stay
    intercept = shifted or (builder._biased(layout.head) and not tied)
    heads = [state[f"{layout.head}.weight"] for state in union.states]
    sizes = [head.shape[1] for head in heads]
    shares = torch.tensor(mean_shares(goals), dtype=torch.float64)
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
    found = fit(stats, root @ prior, builder.settings.ridge, groups, ranks=builder.ranks)
    if tied:
        lengths = torch.tensor(sizes).repeat_interleave(torch.tensor(sizes)) * few
        tables = Tables(grams, cross, mean, stats.mean_in, scale / lengths.sqrt())
        tie(builder, stats, found, prior, tables)
        return
    read = prior
    if isinstance(found.strength, float) and isfinite(found.strength):
        read = ridge(cross, stats.gram, prior, found.strength)
    builder._note(layout.head, found, len(layout.blocks), stats.variance)
    head = builder.target.get_submodule(layout.head)
    assert isinstance(head.weight, Tensor)
    if shifted:
        read = read @ centring(read.shape[1])
        builder.target.get_parameter(f"{layout.final_norm}.bias").fill_(1)
    offset = mean - read @ stats.mean_in
    for part in slices(len(head.weight)):
        table = torch.cat([weight[part].double() for weight in heads], dim=1)
        head.weight[part] = table @ read
        if shifted:
            head.weight[part] += (table @ offset)[:, None] / read.shape[1]
        if isinstance(head.bias, Tensor):
            biases = [state[f"{layout.head}.bias"][part].double() for state in union.states]
            head.bias[part] = table @ offset + shares @ torch.stack(biases)


def _joint(moments: Moments, sites: list[str], scale: Tensor, *, intercept: bool) -> Tensor:
    """Return the joint spread of all sites, scaled."""
    whole = [torch.cat([spread(moments, a, b, intercept=intercept) for b in sites], 1)
             for a in sites]  # fmt: skip
    return scale[:, None] * torch.cat(whole) * scale
