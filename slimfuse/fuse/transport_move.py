"""Move one parent to the anchor's units, in execution order, each space by its own map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs
from slimfuse.errors import ParentError
from slimfuse.families import Block, Family
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.plans import unsolvable
from slimfuse.fuse.transport_heads import (
    contribution_similarity,
    head_masses,
    key_side,
    match_heads,
    units_in_heads,
    weight_similarity,
)
from slimfuse.fuse.transport_policies import MapRecord, TransportSettings, after_addition, record
from slimfuse.fuse.transport_rows import Reading, Sites, Two, anchor_norms, deviations
from slimfuse.fuse.union import Parent
from slimfuse.moments import Moments
from slimfuse.saliency import Scores
from slimfuse.saliency import masses as masses_of
from slimfuse.spaces import Atlas, AxisMap, Leg, LinearMap, Role, transform
from slimfuse.transport import (
    TransportMap,
    combine,
    masses,
    solve,
    standardised_cost,
    uniform,
    weight_cost,
)


@dataclass(frozen=True)
class Evidence:
    """What a plan is solved from: cost (n, m), masses mu (n,) and nu (m,)."""

    cost: Tensor
    mu: Tensor
    nu: Tensor


class Move:
    """The parent's parameters in the anchor's units: `run` returns them, `records` says how."""

    def __init__(
        self,
        parent: Parent,
        anchor: nn.Module,
        family: Family,
        settings: TransportSettings,
        tick: Callable[[], None],
        cache: StreamCache,
        scores: tuple[Scores, Scores] | None = None,
    ) -> None:
        """Take both models; scores: of the parent's and the anchor's units, if masses ask."""
        configs: list[Any] = [parent.model.config, anchor.config]
        self.name, self.settings, self.scores = parent.name, settings, scores
        self.layout = family.layout(configs[1])
        self.space = self.layout.stream_space
        models = (parent.model, anchor)
        self.reading = Reading(models, self.layout, configs[1], settings, tick, cache)
        self.states = [{n: v.double().cpu() for n, v in m.state_dict().items()} for m in models]
        keys = [block.k for block in self.layout.blocks]
        self.atlases = [one_role(family.atlas(c), keys) for c in configs]
        shapes = [family.shape(c) for c in configs]
        self.heads = (shapes[0].num_attention_heads, shapes[1].num_attention_heads)
        self.key_scale = family.head_dims(configs[0]) / family.head_dims(configs[1])
        self.query_scale = family.query_scale(configs[0], configs[1])
        self.moved: dict[str, Tensor] = {}
        self.records: list[MapRecord] = []

    def run(self, batches: Iterable[Inputs]) -> dict[str, Tensor]:
        """Return every parameter; batches are read once, if the settings ask for activations."""
        self._embed(batches)
        for layer, block in enumerate(self.layout.blocks):
            self._attention(layer, block)
            self._mlp(layer, block)
        unread = [self.layout.unread.dense] if self.layout.unread else []
        self._place([self.layout.final_norm, self.layout.head, *unread], {})
        left = self.atlases[0].axes.keys() - self.moved.keys()
        if left:
            raise ParentError(
                "transport to an anchor doesn't know all parameters of the class",
                where=f"parents.{self.name}",
                got=", ".join(sorted(left)[:5]),
                hint="use the refit (slimfuse.fuse.refit)",
            )
        return self.moved

    # -- the sublayers ----------------------------------------------------------------------

    def _embed(self, batches: Iterable[Inputs]) -> None:
        seen = self.reading.embed(batches) if self.settings.needs_activations else None
        names = self.layout.embed_parameters
        x, y = (
            writing_rows(state, atlas, names, self.space)
            for state, atlas in zip(self.states, self.atlases, strict=True)
        )
        self.stream = self._solve(
            "stream.0", self._evidence(seen, (x, y), self._gains(0), self.space)
        )
        self._move(names, {self.space: self.stream})

    def _attention(self, layer: int, block: Block) -> None:
        sites, skip = self.reading.attention(layer)
        stream = {self.space: self.stream}
        q_rows, k_rows, v_rows = (self._rows(path, stream) for path in (block.q, block.k, block.v))
        # as they will be once moved, so that copies are alike: keys inside a head are summed
        q_rows = (self.query_scale * q_rows[0], q_rows[1])
        k_rows = (self.key_scale * k_rows[0], k_rows[1])
        qk_axis, vo_axis = (f"{block.head_space} {s}" for s in (block.qk_space, block.vo_space))
        outputs = self._evidence(sites.get("units"), v_rows, self._norms(block.o), vo_axis)
        heads = None
        if self.settings.heads == "kept":
            alike = self._heads_alike(block, sites.get("units"), (q_rows, k_rows, v_rows))
            heads = self._keep(f"heads.{layer}", match_heads(alike, outputs.mu, outputs.nu))
        vo = self._solve(f"vo.{layer}", outputs, heads)
        partners = [deviations(sites[s]) if s in sites else None for s in ("k", "q")]
        q, k = self._query_and_key(
            layer,
            self._in_heads(self._evidence(sites.get("q"), q_rows, partners[0], qk_axis), outputs),
            self._in_heads(self._evidence(sites.get("k"), k_rows, partners[1], qk_axis), outputs),
            heads,
        )
        key = key_side(k, self.heads)
        self._place([block.attention_norm], {})
        self._place([block.q], {qk_axis: q})
        for name in self._parameters([block.q]):
            self.moved[name] *= self.query_scale
        self._place([block.k], {qk_axis: LinearMap(key, key)})
        self._place([block.v], {vo_axis: vo})
        self._write(block.o, f"attention.{layer}", sites, skip, {vo_axis: vo}, 2 * layer + 1)

    def _query_and_key(
        self, layer: int, q: Evidence, k: Evidence, heads: TransportMap | None
    ) -> tuple[TransportMap, TransportMap]:
        """Return the maps of queries and keys, one map twice unless they are separate."""
        if self.settings.qk == "separate":
            return self._solve(f"q.{layer}", q, heads), self._solve(f"k.{layer}", k, heads)
        if self.settings.qk == "joint":
            q = Evidence(q.cost + k.cost, (q.mu + k.mu) / 2, (q.nu + k.nu) / 2)
        both = self._solve(f"qk.{layer}", q, heads)
        return both, both

    def _heads_alike(self, block: Block, units: Moments | None, rows: Sequence[Two]) -> Tensor:
        """Return how alike heads are (heads, heads), in 0 … 1, by what the cost looks at."""
        found = []
        if self.settings.cost != "weights":
            assert units is not None
            x, y = (s[f"{block.o}.weight"] for s in self.states)
            found.append(contribution_similarity(units, x, y, self.heads))
        if self.settings.cost != "activations":
            found.append(
                torch.stack([weight_similarity(x, y, self.heads) for x, y in rows]).mean(0)
            )
        return torch.stack(found).mean(0)

    def _mlp(self, layer: int, block: Block) -> None:
        sites, skip = self.reading.mlp(layer)
        rows = self._rows(block.up, {self.space: self.stream})
        evidence = self._evidence(
            sites.get("units"), rows, self._norms(block.down), block.mlp_space
        )
        units = {block.mlp_space: self._solve(f"mlp.{layer}", evidence)}
        self._place([block.mlp_norm], {})
        self._place([block.up], units)
        self._write(block.down, f"mlp-out.{layer}", sites, skip, units, 2 * layer + 2)

    def _write(
        self,
        path: str,
        name: str,
        sites: Sites,
        skip: Tensor | None,
        units: Mapping[str, AxisMap],
        depth: int,
    ) -> None:
        """Move a layer that writes the stream, and the stream's map past the addition."""
        seen = sites.get("branch")
        evidence = self._evidence(seen, self._rows(path, units), self._gains(depth), self.space)
        branch = self._solve(name, evidence)
        self._place([path], {**units, self.space: branch})
        norms = None if seen is None else anchor_norms(seen)
        self.stream = after_addition(self.settings.residual, self.stream, branch, skip, norms)
        self._keep(f"stream.{depth}", self.stream)

    # -- plans ------------------------------------------------------------------------------

    def _evidence(self, seen: Moments | None, rows: Two, sent: Two | None, units: str) -> Evidence:
        """Return cost and masses of a site; sent: what a unit's reader makes of it, a number.

        units: the axis' name in the scores.
        """
        settings, costs = self.settings, []
        if settings.cost != "weights":
            assert seen is not None
            own = [seen.cov(s).diagonal() for s in "xy"]
            costs.append(standardised_cost(seen.cov("x", "y"), own[0], own[1]))
        if settings.cost != "activations":
            costs.append(weight_cost(*rows))
        cost = costs[0] if len(costs) == 1 else combine(costs, [1.0] * len(costs))
        if settings.masses == "uniform" or (
            settings.masses == "saliency" and settings.saliency == "uniform"
        ):
            return Evidence(cost, uniform(cost.shape[0]), uniform(cost.shape[1]))
        if self.scores is not None:
            mu, nu = (masses_of(scores[units]) for scores in self.scores)
            return Evidence(cost, mu, nu)
        x, y = (r.norm(dim=1) for r in rows)
        if settings.masses == "saliency":
            assert seen is not None and sent is not None
            x, y = (a * b for a, b in zip(sent, deviations(seen), strict=True))
        return Evidence(cost, masses(x), masses(y))

    def _in_heads(self, units: Evidence, outputs: Evidence) -> Evidence:
        """Return the evidence with every head's mass that of what the head sends on."""
        mu, nu = (
            head_masses(inside, sent, heads)
            for inside, sent, heads in zip(
                (units.mu, units.nu), (outputs.mu, outputs.nu), self.heads, strict=True
            )
        )
        return Evidence(units.cost, mu, nu)

    def _solve(
        self, name: str, evidence: Evidence, heads: TransportMap | None = None
    ) -> TransportMap:
        cost, mu, nu, solver = evidence.cost, evidence.mu, evidence.nu, self.settings.solver
        try:
            if heads is None:
                return self._keep(name, solve(cost, mu, nu, solver))
            return self._keep(name, units_in_heads(cost, mu, nu, heads, solver))
        except ValueError as error:  # a softness that this space, or a head of it, can't have
            raise unsolvable(f"{name} of {self.name}", error) from error

    def _keep(self, name: str, tmap: TransportMap) -> TransportMap:
        self.records.append(record(self.name, name, tmap))
        return tmap

    # -- weights ----------------------------------------------------------------------------

    def _parameters(self, paths: Sequence[str]) -> list[str]:
        names = [f"{path}.{part}" for path in paths for part in ("weight", "bias")]
        return [n for n in names if n in self.atlases[0].axes]

    def _place(self, paths: Sequence[str], maps: Mapping[str, AxisMap]) -> None:
        """Move modules; the stream's axes by its map of now, unless `maps` says otherwise."""
        self._move(self._parameters(paths), {self.space: self.stream, **maps})

    def _move(self, names: Sequence[str], maps: Mapping[str, AxisMap]) -> None:
        self.moved |= transform(self.states[0], self.atlases[0], maps, only=names)

    def _rows(self, path: str, maps: Mapping[str, AxisMap]) -> Two:
        """Return the units' weights, columns aligned by `maps`, with their bias: (units, k)."""
        name, bias = f"{path}.weight", f"{path}.bias"
        aligned = transform(self.states[0], self.atlases[0], maps, only=[name])[name]
        x, y = (
            torch.cat([w, s[bias][:, None]], 1) if bias in s else w
            for w, s in zip((aligned, self.states[1][name]), self.states, strict=True)
        )
        return x, y

    def _norms(self, path: str) -> Two:
        """Return the norms of what a layer makes of each of its inputs."""
        x, y = (s[f"{path}.weight"].norm(dim=0) for s in self.states)
        return x, y

    def _gains(self, depth: int) -> Two:
        """Return the size of the gains with which the norm at a depth reads each channel."""
        layer, half = divmod(depth, 2)
        if layer == len(self.layout.blocks):
            norm = self.layout.final_norm
        else:
            block = self.layout.blocks[layer]
            norm = block.mlp_norm if half else block.attention_norm
        x, y = (s[f"{norm}.weight"].abs() for s in self.states)
        return x, y


def writing_rows(
    state: Mapping[str, Tensor], atlas: Atlas, names: Sequence[str], space: str
) -> Tensor:
    """Return all weights (units, k) with which parameters write each unit of a space."""
    parts = []
    for name in names:
        legs = [any(leg.space == space for leg in axis) for axis in atlas.axes[name]]
        unit = state[name].movedim(legs.index(True), 0)
        parts.append(unit.reshape(len(unit), -1))
    return torch.cat(parts, 1)


def one_role(atlas: Atlas, modules: Sequence[str]) -> Atlas:
    """Return the atlas with the (head, unit) axes of key projections as plain writers.

    Their heads are written and their units read; `key_side` is the one matrix that does both.
    """
    axes = dict(atlas.axes)
    for name in (f"{m}.{part}" for m in modules for part in ("weight", "bias")):
        if name in axes:
            first = tuple(Leg(leg.space, Role.WRITE) for leg in axes[name][0])
            axes[name] = (first, *axes[name][1:])
    return replace(atlas, axes=axes)
