"""Which of the parents' heads and MLP units the target keeps or merges, and the maps for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from slimfuse.errors import ShapeError, UserError
from slimfuse.families import Layout
from slimfuse.fuse.greedy import greedy_groups
from slimfuse.fuse.plans import planned
from slimfuse.fuse.scoring import Saliency
from slimfuse.fuse.solve import decoder, reduce_scores, reduce_values, roots
from slimfuse.fuse.union import Member, Union
from slimfuse.saliency import magnitude, masses
from slimfuse.saliency.ziplm import eliminate
from slimfuse.spaces import Atlas, LinearMap, NestedMap, identity
from slimfuse.spaces.transform import axis_matrix
from slimfuse.transport import Solver, from_assignment, standardised_cost, uniform

Units = Literal["cholesky", "ziplm", "magnitude", "saliency", "ot", "cluster"]
Heads = Literal["drop", "merge"]
Maps = dict[str, LinearMap | NestedMap]
Scores = tuple[Tensor, Tensor]
"""Second moment of all heads' queries and covariance of their keys, both (Σ n, Σ n)."""


class Choosing(Protocol):
    """The settings that a choice asks for."""

    @property
    def units(self) -> Units:
        """How units are chosen."""

    @property
    def saliency(self) -> Saliency:
        """What a unit counts, in a choice by saliency and in plans."""

    @property
    def heads(self) -> Heads:
        """What becomes of the heads that aren't kept."""

    @property
    def solver(self) -> Solver:
        """How plans are solved."""


@dataclass(frozen=True)
class Choice:
    """The units a target gets.

    maps: each member's maps of the spaces of its own block; push: what every unit of the union
    gives to the target's (Σ n, m); sources: parent's name, its block and the unit that each
    target unit is, or is built about; saliency: the share of all scores that the kept ones have,
    None where they weren't chosen by it.
    """

    maps: list[Maps]
    push: Tensor
    sources: tuple[tuple[str, int, int], ...]
    saliency: float | None = None


def keep(
    method: Units,
    cov: Tensor,
    out: Tensor,
    groups: Sequence[Tensor],
    count: int,
    scores: Tensor | None = None,
) -> list[int]:
    """Return the places of the `count` groups to keep.

    magnitude: largest output weights; saliency: largest `scores` (groups,), by default energies
    written to the stream, tr(out C outᵀ); ziplm: those that are left when the cheapest goes time
    after time (`eliminate`); else those that explain the rest best (`greedy_groups`).
    """
    if method == "magnitude":
        return sorted(int(i) for i in magnitude(out, groups).topk(count).indices)
    if method == "saliency":
        scores = unit_scores("energy", cov, out, groups) if scores is None else scores
        return sorted(int(i) for i in scores.topk(count).indices)
    if method == "ziplm":
        return eliminate(cov, out, groups).kept(count)
    return sorted(greedy_groups(cov, out, groups, count))


def unit_scores(kind: Saliency, cov: Tensor, out: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Return scores (groups,) by what is known here: covariance (n, n) and outputs (m, n).

    Of kinds that need gradients, whose scores come with the union, the energy stands in.
    """
    if kind == "uniform":
        return torch.ones(len(groups), dtype=torch.float64)
    if kind == "ziplm":
        return eliminate(cov, out, groups).scores
    if kind == "magnitude":
        return magnitude(out, groups).square()
    if kind == "l1":
        return torch.stack([out[:, g].abs().sum().square() for g in groups])
    return torch.stack([_energy(cov, out, g).clamp_min(0) for g in groups])


def _energy(cov: Tensor, out: Tensor, group: Tensor) -> Tensor:
    part = out[:, group]
    return (part @ cov[group][:, group] * part).sum()


def choose_units(
    union: Union,
    members: Sequence[Member],
    cov: Tensor,
    out: Tensor,
    count: int,
    settings: Choosing,
) -> Choice:
    """Return the choice of `count` MLP units from covariance (Σ n, Σ n) and outputs (m, Σ n).

    cholesky, ziplm, magnitude, saliency: see `keep`. ot: a plan from all units to those that
    cholesky keeps, by correlation. cluster: k-means of the standardised activations (the
    free-support barycentre's hard case). Both then average by the masses of the units' saliency.
    """
    sizes, method = union.units(members, "up"), settings.units
    singles = list(torch.arange(sum(sizes))[:, None])
    scores = _scores(union, members, "down", cov, out, singles, settings)
    order = keep(method, cov, out, singles, count, scores)
    if method in ("ot", "cluster"):
        push = _merged(cov, order, scores, settings)
        order = push.argmax(0).tolist()
    else:
        push = torch.eye(sum(sizes), dtype=torch.float64)[:, order]
    owners = [
        (union.parents[m.parent].name, m.layer, u)
        for m, n in zip(members, sizes, strict=True)
        for u in range(n)
    ]
    parts = zip(members, torch.split(push, sizes), strict=True)
    maps: list[Maps] = [{union.block(m).mlp_space: LinearMap(p, p)} for m, p in parts]
    share = _share(scores, order, settings)
    return Choice(maps, push, tuple(owners[i] for i in order), share)


def _scores(
    union: Union,
    members: Sequence[Member],
    part: str,
    cov: Tensor,
    out: Tensor,
    groups: Sequence[Tensor],
    settings: Choosing,
) -> Tensor | None:
    """Return the scores (groups,) of a part's units or heads; None where no one asks for them."""
    if settings.units not in ("saliency", "ot", "cluster"):
        return None
    given = union.scores(members, part)
    return unit_scores(settings.saliency, cov, out, groups) if given is None else given


def _share(scores: Tensor | None, kept: Sequence[int], settings: Choosing) -> float | None:
    """Return what share of all scores the kept groups have, where they were chosen by these."""
    if scores is None or settings.units != "saliency":
        return None
    some = scores.clamp_min(0)  # estimates of what can't be negative
    return float(some[list(kept)].sum() / some.sum()) if float(some.sum()) > 0 else None


def _merged(cov: Tensor, order: list[int], scores: Tensor | None, settings: Choosing) -> Tensor:
    """Return how units (n) are averaged into target units (n, m), columns sum to 1."""
    assert scores is not None
    variance = cov.diagonal().clamp_min(0)
    mass = uniform(len(scores)) if settings.saliency == "uniform" else masses(scores)
    if settings.units == "ot":
        cost = standardised_cost(cov[:, order], variance, variance[order])
        plan = planned("MLP units", cost, settings.solver).plan
    else:
        from sklearn.cluster import KMeans

        scale = variance.sqrt().clamp_min(1e-12)
        points = roots(cov / torch.outer(scale, scale))[0].numpy()
        means = KMeans(len(order), init=points[order], n_init=1)
        found = means.fit(points, sample_weight=mass.numpy()).labels_
        plan = from_assignment(torch.as_tensor(found, dtype=torch.long), len(order)).plan
    weighted = plan * mass[:, None]
    return weighted / weighted.sum(0).clamp_min(1e-30)


def check_heads(union: Union, atlas: Atlas, layout: Layout, heads: Heads) -> None:
    """Raise an error where heads have to stay whole and aren't asked to; atlas: the target's.

    Rotary positions turn pairs of a head's queries and keys by fixed angles: heads can neither
    shrink nor be averaged, and a key head keeps as many query heads.
    """
    if not union.whole_heads:
        return
    if heads == "merge":
        raise UserError(
            "heads under rotary positions can't be merged",
            where="fuse.heads",
            got=heads,
            allowed="drop",
        )
    wanted = _head_sizes(atlas, layout)
    for parent, own, where in zip(union.parents, union.atlases, union.layouts, strict=True):
        if _head_sizes(own, where) != wanted:
            raise ShapeError(
                "heads under rotary positions keep their size and their groups",
                where=f"parents.{parent.name}",
                got="{} units, {} query heads a key head".format(*_head_sizes(own, where)),
                allowed="{} units, {} query heads a key head, as the target".format(*wanted),
            )


def _head_sizes(atlas: Atlas, layout: Layout) -> tuple[int, int]:
    """Return the units of a head and the query heads of a key head."""
    block = layout.blocks[0]
    group = atlas.spaces[block.group_space].size if block.group_space else 1
    return atlas.spaces[block.qk_space].size, group


def choose_groups(
    union: Union,
    members: Sequence[Member],
    cov: Tensor,
    out: Tensor,
    count: int,
    settings: Choosing,
    kind: str = "",
) -> Choice:
    """Return the choice of `count` key heads, each whole and with all its query heads.

    cov: of all query heads' outputs (Σ n, Σ n); out: what they write (m, Σ n); kind: of the
    target's attention. Heads of another kind see other tokens and turn by other angles: they come
    in only where there are too few of this one.
    """
    heads = [union.atlases[m.parent].spaces[union.block(m).head_space].size for m in members]
    size = len(cov) // sum(heads)
    groups = list(torch.arange(len(cov)).split(size))
    alike = [union.block(m).kind == kind for m, n in zip(members, heads, strict=True)
             for _ in range(n)]  # fmt: skip
    mine = [i for i, own in enumerate(alike) if own]
    if len(mine) < count:
        mine = list(range(len(groups)))
    scores = _scores(union, members, "o", cov, out, groups, settings)
    some = None if scores is None else scores[mine]
    found = keep(settings.units, cov, out, [groups[i] for i in mine], count, some)
    kept = [mine[i] for i in found]
    picks = torch.eye(sum(heads), dtype=torch.float64)[:, kept]
    parts = zip(members, picks.split(heads), strict=True)
    maps: list[Maps] = [{union.block(m).head_space: LinearMap(pick, pick)} for m, pick in parts]
    push = torch.eye(len(cov), dtype=torch.float64)[:, torch.cat([groups[i] for i in kept])]
    owners = [
        (union.parents[m.parent].name, m.layer, h)
        for m, n in zip(members, heads, strict=True)
        for h in range(n)
    ]
    share = _share(scores, kept, settings)
    return Choice(maps, push, tuple(owners[i] for i in kept), share)


def choose_heads(
    union: Union,
    members: Sequence[Member],
    cov: Tensor,
    out: Tensor,
    scores: Scores,
    count: int,
    dims: int,
    settings: Choosing,
) -> Choice:
    """Return the choice of `count` heads of `dims` units each.

    cov: of all heads' outputs (Σ n, Σ n); out: what they write (m, Σ n). Heads of another size
    are reduced (`reduce_scores`, `reduce_values`). merge: every head that isn't kept joins the
    kept one whose contribution to the stream is most like its own; the scores of a group are
    averaged by the energy that its heads write, and the group is reduced as one head.
    """
    heads = [n // union.head_dims[m.parent]
             for m, n in zip(members, union.units(members, "v"), strict=True)]  # fmt: skip
    owners = [(k, h) for k, n in enumerate(heads) for h in range(n)]
    groups, offset = [], 0
    for k, _ in owners:
        size = union.head_dims[members[k].parent]
        groups.append(torch.arange(offset, offset + size))
        offset += size
    scores_of = _scores(union, members, "o", cov, out, groups, settings)
    kept = keep(settings.units, cov, out, groups, count, scores_of)
    joined = [[i] for i in kept]
    if settings.heads == "merge":
        for i in set(range(len(owners))) - set(kept):
            like = [_likeness(cov, out, groups[i], groups[j]) for j in kept]
            joined[int(torch.stack(like).argmax())].append(i)
    picks = [torch.zeros(n, count, dtype=torch.float64) for n in heads]
    inner: dict[int, tuple[LinearMap, LinearMap]] = {}
    for place, group in enumerate(joined):
        found = _reduced(cov, out, scores, [groups[i] for i in group], dims)
        for i, maps in zip(group, found, strict=True):
            inner[i] = maps
            picks[owners[i][0]][owners[i][1], place] = 1
    nothing = [torch.zeros(len(g), dims, dtype=torch.float64) for g in groups]
    everyone: list[Maps] = []
    for k, member in enumerate(members):
        block = union.block(member)
        mine = [i for i, (owner, _) in enumerate(owners) if owner == k]
        blank = [(LinearMap(nothing[i], nothing[i]),) * 2 for i in mine]
        pairs = [inner.get(i, b) for i, b in zip(mine, blank, strict=True)]
        everyone.append(
            {
                block.head_space: LinearMap(picks[k], picks[k]),
                block.qk_space: NestedMap([qk for qk, _ in pairs]),
                block.vo_space: NestedMap([vo for _, vo in pairs]),
            }
        )
    push = torch.cat(
        [
            axis_matrix(atlas.axes[f"{union.block(m).v}.weight"][0], atlas, maps)
            for m, maps in zip(members, everyone, strict=True)
            for atlas in (union.atlases[m.parent],)
        ]
    )
    names = [(union.parents[members[k].parent].name, members[k].layer, h) for k, h in owners]
    share = _share(scores_of, kept, settings)
    return Choice(everyone, push, tuple(names[i] for i in kept), share)


def _likeness(cov: Tensor, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return |E[c_a · c_b]| of two heads' contributions to the stream, in units of c_b's energy."""
    cross = (out[:, a] @ cov[a][:, b] * out[:, b]).sum().abs()
    return cross / _energy(cov, out, b).clamp_min(1e-30).sqrt()


def _reduced(
    cov: Tensor, out: Tensor, scores: Scores, parts: list[Tensor], dims: int
) -> list[tuple[LinearMap, LinearMap]]:
    """Return the maps of queries/keys and of values of each head that goes into one target head.

    parts: the heads' places among all units. Σ_h a_h q_h·k_h, with a_h the share of the energy
    that head h writes, is one product of the heads' queries and keys side by side.
    """
    if len(parts) == 1 and len(parts[0]) == dims:
        return [(identity(dims), identity(dims))]
    energy = torch.stack([_energy(cov, out, g).clamp_min(0) for g in parts])
    shares = energy / energy.sum().clamp_min(1e-30)
    sizes = [len(g) for g in parts]
    scale = shares.sqrt().repeat_interleave(torch.tensor(sizes))
    index = torch.cat(parts)
    query, key = (torch.outer(scale, scale) * m[index][:, index] for m in scores)
    push_q, push_k = (scale[:, None] * p for p in reduce_scores(query, key, dims))
    push_v = reduce_values(cov[index][:, index], out[:, index], dims)
    back_v = decoder(cov[index][:, index], push_v)
    found = zip(*(torch.split(p, sizes) for p in (push_q, push_k, push_v, back_v)), strict=True)
    return [(LinearMap(q, k), LinearMap(v, back)) for q, k, v, back in found]
