"""Intra-Fusion: one model narrowed by merging its units onto the most salient of them.

Where pruning throws units away, a plan π between all n units of a space and the m that are kept
averages them into those: writers move by π/ν, readers by π/μ, with √saliency as the mass of a unit
(Theus et al. 2024, arXiv 2402.07839, section 3; normalised as in fusion.md §1). Units that are
coupled, such as the stream's channels, have one plan; heads match whole, then the units inside.

A copy of a kept unit is never kept beside it while there are others, so a model whose units were
duplicated comes back exactly from an exact plan: in equal numbers with any masses; in unequal ones
inside MLPs with `targets: nearest`, where a kept unit has the mass of all that are nearest to it.
Behind rotary positions heads can't be averaged: the most salient stay as they are. Products of two
units (gated MLPs) and units whose signs or scales differ are averaged all the same: this is a
start, not an equivalence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches
from slimfuse.errors import ParentError
from slimfuse.families import Block, Family
from slimfuse.fuse.baselines import shortened
from slimfuse.fuse.narrowing import count_rows
from slimfuse.fuse.plans import unsolvable
from slimfuse.fuse.scoring import Saliency, subject
from slimfuse.fuse.transport import TransportFusion
from slimfuse.fuse.transport_heads import (
    contribution_similarity,
    head_masses,
    key_side,
    match_heads,
    units_in_heads,
)
from slimfuse.fuse.transport_move import one_role, writing_rows
from slimfuse.fuse.transport_policies import MapRecord, record
from slimfuse.moments import Moments
from slimfuse.saliency import Scores, masses, score
from slimfuse.saliency.activity import observed
from slimfuse.saliency.units import Site, sites
from slimfuse.spaces import AxisMap, LinearMap, NestedMap, Role, transform
from slimfuse.transport import (
    Solver,
    TransportMap,
    combine,
    solve,
    standardised_cost,
    uniform,
    weight_cost,
)

Cost = Literal["activations", "weights", "combined"]
Targets = Literal["own", "nearest", "uniform"]
DEAD = 1e-12  # of the largest variance
TWINS = 1e-6  # units this much nearer than all are on average count as one


@dataclass(frozen=True)
class IntraSettings:
    """How units are scored, compared and merged.

    saliency: which units stay, and the masses of all ("uniform": by energy, with equal masses).
    cost: "activations" 2(1 − ρ), "weights" |w_i − w_j|² of what writes them, or both. targets: the
    mass of a kept unit: its own, that of all that are nearest to it, or the same for all. seed: of
    the saliency's random numbers, where it has any.
    """

    saliency: Saliency = "mask-fisher"
    cost: Cost = "activations"
    targets: Targets = "nearest"
    solver: Solver = field(default_factory=Solver)
    seed: int = 0


def intra_fuse(
    parent: nn.Module,
    target: nn.Module,
    family: Family,
    batches: Batches,
    settings: IntraSettings = IntraSettings(),
    *,
    name: str = "parent",
) -> TransportFusion:
    """Write the parent, its units merged into as many as `target` has, into it; return the maps.

    Of deeper parents evenly spaced blocks stay. Raises ParentError for spaces that have to shrink
    and whose units can't be seen, UserError for plans that can't be had.
    """
    state, _ = shortened(parent, target, family)
    depths = [family.shape(m.config).num_hidden_layers for m in (parent, target)]
    if depths[0] != depths[1]:
        shape = replace(family.shape(parent.config), num_hidden_layers=depths[1])
        short = family.build(family.narrow(parent.config, shape))
        short.to(next(parent.parameters()).dtype).load_state_dict(state, strict=False)
        parent = short
    merge = Merge(parent, target, family, batches, settings, name)
    moved = merge.run()
    with torch.no_grad():
        for key, value in target.named_parameters():
            value.copy_(moved[key])
    return TransportFusion(tuple(merge.records), (0.0, 1.0))


class Merge:
    """One model's way into a narrower one; `records` says how it went."""

    def __init__(
        self,
        model: nn.Module,
        target: nn.Module,
        family: Family,
        batches: Batches,
        settings: IntraSettings,
        name: str,
    ) -> None:
        configs: list[Any] = [model.config, target.config]
        self.name, self.settings = name, settings
        self.layout = family.layout(configs[0])
        self.atlas, self.narrow = family.atlas(configs[0]), family.atlas(configs[1])
        self.state = {n: p.detach().double().cpu() for n, p in model.named_parameters()}
        self.query_scale = family.query_scale(configs[0], configs[1])
        rows = count_rows(model, self.layout, batches())
        asked = subject(model, family, batches, rows, settings.seed)
        kind = "energy" if settings.saliency == "uniform" else settings.saliency
        # queries aren't read linearly: those who score by what is read leave them to their norm
        self.scores: Scores = score("magnitude", asked) | score(kind, asked)
        self.sites = {site.name: site for site in sites(self.atlas, self.layout)}
        self.seen: dict[str, Moments] = {}
        if settings.cost != "weights":
            self.seen = observed(asked, list(self.sites.values()))
        self.keys: dict[str, LinearMap] = {}  # of key projections, which write and read at once
        self.records: list[MapRecord] = []

    def run(self) -> dict[str, Tensor]:
        """Return the parameters, merged."""
        maps: dict[str, AxisMap | NestedMap] = {}
        for site in self.sites.values():
            if len(site.spaces) == 1 and self._size(site.name) < site.units:
                maps[site.name] = self._merged(site)
        for layer, block in enumerate(self.layout.blocks):
            maps |= self._heads(layer, block)
        covered = {space for name in maps for space in name.split()}
        left = [
            f"{space}: {self.atlas.spaces[space].size} units, the target has {self._size(space)}"
            for space in self.atlas.free
            if space not in covered and self._size(space) != self.atlas.spaces[space].size
        ]
        if left:
            raise ParentError(
                "intra-fusion can't see the units of every space that has to shrink",
                where=f"parents.{self.name}",
                got="; ".join(left[:3]),
                hint="use the refit (slimfuse.fuse.refit)",
            )
        atlas = one_role(self.atlas, [block.k for block in self.layout.blocks])
        keys = {f"{b.k}.{part}": b for b in self.layout.blocks for part in ("weight", "bias")}
        moved = transform(self.state, atlas, maps, only=[n for n in atlas.axes if n not in keys])
        for name, block in keys.items():
            if name in atlas.axes:
                pairs = f"{block.head_space} {block.qk_space}"
                own = maps | {pairs: self.keys[block.k]} if block.k in self.keys else maps
                moved |= transform(self.state, atlas, own, only=[name])
        for block in self.layout.blocks:
            for name in (f"{block.q}.weight", f"{block.q}.bias"):
                if name in moved:
                    moved[name] *= self.query_scale
        return moved

    def _size(self, space: str) -> int:
        """Return how many units the target has."""
        return self.narrow.spaces[space].size

    def _merged(self, site: Site) -> TransportMap:
        """Return the plan of a space by itself."""
        cost = self._cost(site)
        kept = leading(self.scores[site.name], cost, self._size(site.name))
        mu = self._masses(site.name)
        nu = self._targets(mu, cost[:, kept], kept)
        return self._solve(site.name, cost[:, kept], mu, nu)

    def _heads(self, layer: int, block: Block) -> dict[str, AxisMap | NestedMap]:
        """Return the maps of a block's heads: joined with those of the units inside them."""
        head, qk, vo = block.head_space, block.qk_space, block.vo_space
        wanted, dims = self._size(head), self._size(vo)
        heads = self.atlas.spaces[head].size
        if wanted == heads and dims == self.atlas.spaces[vo].size:
            return {}
        likeness = self._likeness(block, heads)
        kept = leading(self.scores[head], 1 - likeness, wanted)
        if self.atlas.spaces[qk].kind == "fixed":
            pick = torch.eye(heads, dtype=torch.float64)[:, kept]
            return {head: LinearMap(pick, pick)}
        outputs, pairs = f"{head} {vo}", f"{head} {qk}"
        mu = self._masses(outputs)
        inside = self._kept_inside(outputs, heads, kept, dims)
        totals = mu.reshape(heads, -1).sum(1)
        share = mu[inside].reshape(wanted, -1)
        nu = self._targets(totals, 1 - likeness[:, kept], kept)
        nu = (share / share.sum(1, keepdim=True) * nu[:, None]).reshape(-1)
        matched = match_heads(likeness[:, kept], mu, nu)
        self._keep(f"heads.{layer}", matched)
        values = self._solve_inside(f"vo.{layer}", outputs, inside, mu, nu, matched)
        asking = self._kept_inside(pairs, heads, kept, self._size(qk))
        own = self._masses(pairs)
        mu_q = head_masses(own, mu, heads)
        nu_q = head_masses(own[asking], nu, wanted)
        queries = self._solve_inside(f"qk.{layer}", pairs, asking, mu_q, nu_q, matched)
        key = key_side(queries, (heads, wanted))
        self.keys[block.k] = LinearMap(key, key)
        return {outputs: values, pairs: queries}

    # -- evidence ---------------------------------------------------------------------------

    def _masses(self, axis: str) -> Tensor:
        found = self.scores[axis]
        return uniform(len(found)) if self.settings.saliency == "uniform" else masses(found)

    def _targets(self, mu: Tensor, cost: Tensor, kept: list[int]) -> Tensor:
        """Return the masses of kept units."""
        if self.settings.targets == "uniform":
            return uniform(len(kept))
        if self.settings.targets == "own":
            return mu[kept] / mu[kept].sum()
        nearest = cost.argmin(1)
        nearest[kept] = torch.arange(len(kept))
        total = torch.zeros(len(kept), dtype=torch.float64).index_add_(0, nearest, mu)
        return total / total.sum()

    def _cost(self, site: Site) -> Tensor:
        """Return how unlike units are (n, n).

        Units that never vary say nothing by their activations: there weights do.
        """
        names = [n for n in self.atlas.users(site.spaces[-1], Role.WRITE) if n in self.state]
        rows = writing_rows(self.state, self.atlas, names, site.spaces[-1])
        weights = weight_cost(rows, rows)
        if self.settings.cost == "weights":
            return weights
        cov = self.seen[site.name].cov("x")
        variance = cov.diagonal()
        dead = variance <= DEAD * variance.max()
        unlike = 2 * (weights / weights.mean().clamp_min(1e-300)).clamp_max(1.0)
        activations = standardised_cost(cov, variance, variance)
        activations = torch.where(dead[:, None] | dead[None], unlike, activations)
        if self.settings.cost == "activations":
            return activations
        return combine([activations, weights])

    def _likeness(self, block: Block, heads: int) -> Tensor:
        """Return how alike heads are (heads, heads), in 0 … 1, by what they write.

        By weights alone heads' outputs count as those of white inputs.
        """
        out = self.state[f"{block.o}.weight"]
        if self.seen:
            site = next(s for s in self.sites.values() if s.paths == (block.o,))
            cov = self.seen[site.name].cov("x")
        else:
            value = self.state[f"{block.v}.weight"]
            group = out.shape[1] // len(value)  # query heads of one key head see the same values
            value = value.unflatten(0, (heads, -1)).repeat_interleave(group, 0).flatten(0, 1)
            cov = value @ value.T
        return contribution_similarity(_Alone(cov), out, out, (heads, heads))

    def _kept_inside(self, axis: str, heads: int, kept: list[int], dims: int) -> Tensor:
        """Return the places of the `dims` leading units of every kept head."""
        site, scores = self.sites[axis], self.scores[axis]
        size = site.units // heads
        cost = self._cost(site)
        found = []
        for h in kept:
            own = slice(h * size, (h + 1) * size)
            found += [h * size + i for i in leading(scores[own], cost[own, own], dims)]
        return torch.tensor(found)

    # -- plans ------------------------------------------------------------------------------

    def _solve(self, name: str, cost: Tensor, mu: Tensor, nu: Tensor) -> TransportMap:
        try:
            return self._keep(name, solve(cost, mu, nu, self.settings.solver))
        except ValueError as error:
            raise unsolvable(f"{name} of {self.name}", error) from error

    def _solve_inside(
        self, name: str, axis: str, kept: Tensor, mu: Tensor, nu: Tensor, heads: TransportMap
    ) -> TransportMap:
        """Return the plan of an axis' units, which stay inside matched heads."""
        cost = self._cost(self.sites[axis])[:, kept]
        try:
            return self._keep(name, units_in_heads(cost, mu, nu, heads, self.settings.solver))
        except ValueError as error:
            raise unsolvable(f"{name} of {self.name}", error) from error

    def _keep(self, name: str, tmap: TransportMap) -> TransportMap:
        self.records.append(record(self.name, name, tmap))
        return tmap


@dataclass(frozen=True)
class _Alone:
    """One model's covariance as that of sites x and y."""

    matrix: Tensor

    def cov(self, _a: str, _b: str | None = None, /) -> Tensor:
        return self.matrix


def leading(scores: Tensor, cost: Tensor, count: int) -> list[int]:
    """Return the `count` units of the largest scores, in their own order, no copies of each other.

    scores: (n,); cost: (n, n). Copies come in where nothing else is left.
    """
    near = TWINS * float(cost.mean())
    kept: list[int] = []
    copies: list[int] = []
    for unit in scores.argsort(descending=True, stable=True).tolist():
        twin = bool(kept) and float(cost[unit, kept].min()) <= near
        (copies if twin else kept).append(unit)
        if len(kept) == count:
            break
    return sorted((kept + copies)[:count])
