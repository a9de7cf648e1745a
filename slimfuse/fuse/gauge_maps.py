"""The maps that bring one model into another's coordinates, from their joint moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfuse.families import Layout
from slimfuse.fuse.gauge_stats import Meeting
from slimfuse.moments import Moments
from slimfuse.spaces import AxisMap, LinearMap, NestedMap
from slimfuse.transport import correlation, solve

Maps = dict[str, AxisMap | NestedMap]
Match = Callable[[Tensor], AxisMap]  # similarity (n of b, m of a) -> map of b's units to a's


@dataclass(frozen=True)
class Alignment:
    """The maps of a model b into a's coordinates, and how well its parts then agree with a's.

    stream: E<x_a, R x_b> of unit streams; heads, units: per layer, the mean correlation of
    matched heads' contributions to the stream and of matched MLP units. All at most 1.
    """

    maps: Maps
    stream: float
    heads: tuple[float, ...]
    units: tuple[float, ...]


def procrustes(cross: Tensor) -> Tensor:
    """Return the orthogonal R (n, n) that maximises tr(Rᵀ cross): R = U Vᵀ (Schönemann 1966).

    cross: E[a bᵀ], so that a ≈ R b. Where cross is singular the rest of R is any completion.
    """
    u, _, vh = torch.linalg.svd(cross)
    rotation: Tensor = u @ vh
    return rotation


def assign(similarity: Tensor) -> LinearMap:
    """Return the permutation of n units onto n that maximises the summed similarity (n, n)."""
    plan = solve(similarity.max() - similarity).plan  # uniform masses: an assignment is optimal
    hard = torch.nn.functional.one_hot(plan.argmax(1), plan.shape[1]).double()
    assert bool((hard.sum(0) == 1).all()), "the plan is no permutation"
    return LinearMap(hard, hard)


def rotation_map(rotation: Tensor) -> LinearMap:
    """Return the map of coordinates a ≈ R b: both its sides are Rᵀ, as R is orthogonal."""
    return LinearMap(rotation.T, rotation.T)


def turn_stream(second: Tensor) -> Tensor:
    """Return the orthogonal R (d, d) with R 1 = 1 that best takes stream b to a.

    second: E[a bᵀ] of streams off the all-ones direction. R is orthogonal Procrustes inside the
    complement of 1: the one rotation that LayerNorm allows.
    """
    size = len(second)
    scale = second.norm().clamp_min(torch.finfo(second.dtype).tiny)
    return procrustes(second + scale * torch.ones_like(second) / size)


def gauge_maps(
    met: Meeting,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    layout: Layout,
    head_dims: int,
) -> Alignment:
    """Return the maps of b into a's gauge, over the whole symmetry of a pre-norm LayerNorm model.

    a, b: canonical parameters. Stream: `turn_stream`; heads: assignment on the correlation of
    their contributions to the turned stream; in a head: one rotation of q and k by Procrustes of
    both activations, one of v and o by Procrustes of what attention gives and of both weights;
    MLP units: assignment on the correlation of activations plus the cosines of what is read and
    written. Every map is an exact symmetry of b. Source: fusion.md §8; that weights join the
    activations for values and MLP units, and not for the scores or the stream, is measured.
    """
    rotation = turn_stream(met.stream.second("a", "b"))
    maps: Maps = {layout.stream_space: rotation_map(rotation)}
    heads, units = [], []
    for layer, block in enumerate(layout.blocks):
        out_a, out_b = a[f"{block.o}.weight"], rotation @ b[f"{block.o}.weight"]
        likeness = head_likeness(met.context[layer], out_a, out_b, head_dims)
        match = assign(likeness.T)
        own = match.push.argmax(1)
        scores = [about_zero(met.q[layer]), centred(met.k[layer])]
        values = [
            centred(met.context[layer]),
            products(out_a.T, out_b.T),
            products(a[f"{block.v}.weight"], b[f"{block.v}.weight"] @ rotation.T),
        ]
        maps[block.qk_space] = turn_heads(scores, head_dims, own)
        maps[block.vo_space] = turn_heads(values, head_dims, own)
        maps[block.head_space] = match
        rho = correlation(*met.units[layer].covariance())
        up = cosines(a[f"{block.up}.weight"], b[f"{block.up}.weight"] @ rotation.T)
        down = cosines(a[f"{block.down}.weight"].T, b[f"{block.down}.weight"].T @ rotation.T)
        maps[block.mlp_space] = assign((rho + up + down).T)
        heads.append(_agreement(likeness.T, match))
        units.append(_agreement(rho.T, maps[block.mlp_space]))
    return Alignment(maps, _stream_agreement(met, rotation), tuple(heads), tuple(units))


def match_maps(
    met: Meeting,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    layout: Layout,
    head_dims: int,
    match: Match,
) -> Alignment:
    """Return the maps of b that mix units with units only: permutation or soft transport.

    Every space by `match` on the correlation of activations: stream channels, units inside heads
    (one map of q and k, one of values), MLP units. Heads as wholes are assigned, because mixed
    heads would have no inner units in common (arXiv 2310.05719; controls of fusion.md §8).
    """
    stream = match(_correlation(met.stream).T)
    maps: Maps = {layout.stream_space: stream}
    heads, units = [], []
    for layer, block in enumerate(layout.blocks):
        out_a, out_b = a[f"{block.o}.weight"], stream.push.T @ b[f"{block.o}.weight"]
        likeness = head_likeness(met.context[layer], out_a, out_b, head_dims)
        outer = assign(likeness.T)
        qk, vo = [], []
        for own, its in enumerate(outer.push.argmax(1).tolist()):
            rows = slice(its * head_dims, (its + 1) * head_dims)
            columns = slice(own * head_dims, (own + 1) * head_dims)
            both = _correlation(met.q[layer], rows, columns) + _correlation(
                met.k[layer], rows, columns
            )
            qk.append(match(both.T / 2))
            vo.append(match(_correlation(met.context[layer], rows, columns).T))
        maps[block.head_space] = outer
        maps[block.qk_space], maps[block.vo_space] = NestedMap(qk), NestedMap(vo)
        rho = correlation(*met.units[layer].covariance()).T
        maps[block.mlp_space] = match(rho)
        heads.append(_agreement(likeness.T, outer))
        units.append(_agreement(rho, maps[block.mlp_space]))
    agreement = _stream_agreement(met, stream.push.T)
    return Alignment(maps, agreement, tuple(heads), tuple(units))


def head_likeness(context: Moments, out_a: Tensor, out_b: Tensor, dims: int) -> Tensor:
    """Return the correlations (heads of a, heads of b) of what heads write to the stream.

    E<W_h c_h, W_g c_g> about the means, over the root of both energies. out_a, out_b: output
    weights (d, heads·dims) in the same stream.
    """

    def blocks(cov: Tensor, left: Tensor, right: Tensor) -> Tensor:
        shared = cov * (left.T @ right)
        found: Tensor = shared.unflatten(1, (-1, dims)).unflatten(0, (-1, dims)).sum((1, 3))
        return found

    cross = blocks(context.cov("a", "b"), out_a, out_b)
    own = [blocks(context.cov(s), w, w).diagonal() for s, w in (("a", out_a), ("b", out_b))]
    return correlation(cross, own[0], own[1])


Products = tuple[Tensor, Tensor, Tensor]  # of a with b, a with a, b with b


def about_zero(moments: Moments) -> Products:
    """Return second moments: queries enter about zero, as their mean acts on the scores."""
    return moments.second("a", "b"), moments.second("a"), moments.second("b")


def centred(moments: Moments) -> Products:
    """Return covariances: what is constant over keys leaves the softmax as it was."""
    return moments.cov("a", "b"), moments.cov("a"), moments.cov("b")


def products(a: Tensor, b: Tensor) -> Products:
    """Return the products of weights whose rows (units, d) are in the same stream."""
    return a @ b.T, a @ a.T, b @ b.T


def turn_heads(pairs: Sequence[Products], dims: int, head_of: Tensor) -> NestedMap:
    """Return for every head of b the rotation that best takes all its products to a's head.

    head_of: a's head for each of b's. The products are each divided by the root of their traces
    before they are summed, so that a large one doesn't drown the other.
    """
    found = []
    for own, its in enumerate(head_of.tolist()):
        rows = slice(its * dims, (its + 1) * dims)
        columns = slice(own * dims, (own + 1) * dims)
        total = torch.zeros(dims, dims, dtype=torch.float64)
        for cross, a, b in pairs:
            energy = a[rows, rows].trace() * b[columns, columns].trace()
            total += cross[rows, columns] / energy.sqrt().clamp_min(1e-30)
        found.append(rotation_map(procrustes(total)))
    return NestedMap(found)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines (n, m) of rows of weights."""
    return correlation(a @ b.T, a.square().sum(1), b.square().sum(1))


def _correlation(
    moments: Moments, rows: slice = slice(None), columns: slice = slice(None)
) -> Tensor:
    a, b = moments.cov("a").diagonal()[rows], moments.cov("b").diagonal()[columns]
    return correlation(moments.cov("a", "b")[rows, columns], a, b)


def _agreement(similarity: Tensor, found: AxisMap | NestedMap) -> float:
    """Return the mean similarity (n, m) of a's units with the units of b that make them up."""
    assert not isinstance(found, NestedMap)
    return float((similarity * found.push).sum(0).mean())


def _stream_agreement(met: Meeting, write: Tensor) -> float:
    """Return E<a, write b> over the root of E|a|² E|write b|²."""
    energy = (write @ met.stream.second("b") @ write.T).trace() * met.stream.second("a").trace()
    return float((met.stream.second("a", "b") * write).sum() / energy.sqrt().clamp_min(1e-30))
