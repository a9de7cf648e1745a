"""Sequential least-squares refit (fusion.md §5): build the target layer by layer in closed form.

Several parents are treated as one wide network. Its stream is their consensus y = Σ_p K_p x_p,
its heads and MLP units are all the parents' own, each writing K_p W to y. The target keeps the
units that explain the rest best, and every layer is then solved against what the already-built
part of the target really produces. Rows are weighted by what they matter to the parents' logits
(see `importance`): after the last attention only the readout token does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from slimfuse.families import Family
from slimfuse.fuse import walk
from slimfuse.fuse.choice import Choice, Units, choose_heads, choose_units
from slimfuse.fuse.importance import token_importance
from slimfuse.fuse.solve import decoder, ridge
from slimfuse.fuse.stream import Consensus, StreamMap, StreamMethod, centring, consensus, stream_map
from slimfuse.fuse.union import Parent, Union
from slimfuse.fuse.walk import rows
from slimfuse.moments import Moments
from slimfuse.progress import track
from slimfuse.spaces import AxisMap, LinearMap, transform

__all__ = ["Batches", "Fusion", "Parent", "Part", "Settings", "refit"]

_T = TypeVar("_T")
Batches = Callable[[], Iterable[Tensor]]
Sources = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Settings:
    """ridge: relative to the mean diagonal; reg: entropic plans, in units of the mean cost."""

    stream: StreamMethod = "pca"
    units: Units = "cholesky"
    ridge: float = 1e-3
    reg: float | None = None


@dataclass(frozen=True)
class Part:
    """One fitted part: what share of its goal's variance was missed, which units it came from."""

    layer: int
    part: str
    error: float
    sources: Sources = ()


@dataclass(frozen=True)
class Fusion:
    """What a refit did: the stream's consensus and map, every fitted part, the stream's error."""

    consensus: Consensus
    stream: StreamMap
    parts: tuple[Part, ...]
    stream_errors: tuple[float, ...]


def refit(
    parents: Sequence[Parent],
    target: nn.Module,
    family: Family,
    batches: Batches,
    settings: Settings,
    *,
    n_batches: int,
) -> Fusion:
    """Write the fused weights into `target` and return what was done.

    parents: models of one family and depth, any widths; the first is the anchor. batches: gives
    the same unlabelled inputs (batch, …) each time it is called. Moments are float64, forward
    passes run in the models' own dtype. Source: fusion.md §3-5.
    """
    with torch.no_grad():
        return _Refit(parents, target, family, batches, settings, n_batches).run()


class _Refit:
    def __init__(
        self,
        parents: Sequence[Parent],
        target: nn.Module,
        family: Family,
        batches: Batches,
        settings: Settings,
        n_batches: int,
    ) -> None:
        self.union = Union(parents, family)
        self.target, self.settings = target, settings
        self.batches, self.n_batches = batches, n_batches
        self.layout = family.layout(target.config)
        self.shape = family.shape(target.config)
        self.width = self.shape.hidden_size
        self.head_dims = family.head_dims(target.config)
        self.query_scales = [family.query_scale(p.model.config, target.config) for p in parents]
        self.parts: list[Part] = []
        self.stream_errors: list[float] = []
        # the cached streams, one entry a batch: every parent's and the target's
        self.x: list[list[Tensor]] = []
        self.z: list[Tensor] = []

    def run(self) -> Fusion:
        parents = self.union.parents
        self.importance = token_importance(
            [p.model for p in parents], self.union.layouts, self.batches(),
            [p.weight for p in parents],
        )  # fmt: skip
        joint = self.union.joint_stream(self.batches(), self.importance, self.n_batches)
        common = consensus(joint, self.union.widths, [p.weight for p in parents])
        narrow = stream_map(common.second, self.width, self.settings.stream, reg=self.settings.reg)
        self.mixes = [narrow.encode @ mix for mix in common.mixes]
        self.readbacks = [back @ narrow.decode for back in common.readbacks]
        self._embed()
        steps = 2 * len(self.layout.blocks)
        with track("fusing layers", steps) as tell:
            for layer in range(len(self.layout.blocks)):
                self._attention(layer)
                tell(2 * layer + 1)
                self._mlp(layer)
                tell(2 * layer + 2)
        self._head()
        return Fusion(common, narrow, tuple(self.parts), tuple(self.stream_errors))

    # -- the stream -------------------------------------------------------------------------

    def _weights(self, depth: int, samples: int) -> Tensor:
        return self.importance[depth].repeat(samples)  # one a row (samples·tokens,)

    def _mixed(self, streams: Sequence[Tensor]) -> Tensor:
        """Return rows (tokens, m) of E y for the parents' streams."""
        return _total(rows(x) @ mix.T for x, mix in zip(streams, self.mixes, strict=True))

    def _transported(
        self, names: Sequence[str], others: Sequence[Mapping[str, AxisMap]] | None = None
    ) -> dict[str, Tensor]:
        """Return the sum of the parents' parameters, written to the target's stream.

        others: each parent's maps of the spaces that are read.
        """
        moved: dict[str, list[Tensor]] = {name: [] for name in names}
        for p, (state, atlas) in enumerate(zip(self.union.states, self.union.atlases, strict=True)):
            write = self.mixes[p].T
            maps: dict[str, AxisMap] = {self.layout.stream_space: LinearMap(write, write)}
            maps |= {} if others is None else others[p]
            part = transform({n: state[n].double() for n in names}, atlas, maps, only=names)
            for name, value in part.items():
                moved[name].append(value)
        return {name: _total(values) for name, values in moved.items()}

    def _embed(self) -> None:
        """Write the embeddings, which move exactly, and start the cached streams."""
        for name, value in self._transported(self.layout.embed_parameters).items():
            self.target.get_parameter(name).copy_(value)
        for batch in self.batches():
            self.x.append(self.union.embed(batch))
            self.z.append(walk.embed(self.target, self.layout, batch))

    # -- the sublayers ----------------------------------------------------------------------

    def _attention(self, layer: int) -> None:
        block, union = self.layout.blocks[layer], self.union
        contexts = Moments(all=sum(union.units(layer, "v")))
        queries, keys = ([Moments(x=d) for d in union.widths] for _ in range(2))
        after = []
        for streams in self.x:
            normed = union.normed(block.attention_norm, streams)
            heads, mid = union.attention(layer, streams, normed)
            after.append(mid)
            weights = self._weights(2 * layer + 1, len(streams[0]))
            contexts.update(weights, all=torch.cat([rows(h) for h in heads], dim=1))
            for query, key, x in zip(queries, keys, normed, strict=True):
                query.update(weights, x=rows(x))  # a query acts on its own token only
                key.update(x=rows(x))
        choice = choose_heads(
            union, layer, contexts.cov("all"), union.outputs(self.mixes, layer, "o"),
            [union.head_scores(p, layer, queries[p], keys[p]) for p in range(len(union))],
            self.shape.num_attention_heads, self.head_dims, self.settings.units,
        )  # fmt: skip
        if self.target.get_submodule(block.q).bias is None:
            # what it normalises is orthogonal to the ones, so they stand for a bias of the readers
            self.target.get_parameter(f"{block.attention_norm}.bias").fill_(1)
        read = self._reading(block.attention_norm, 2 * layer)
        ask = self._reading(block.attention_norm, 2 * layer + 1)
        norm = block.attention_norm
        self._fit_reader(block.q, layer, norm, choice, ask, self.query_scales)
        self._fit_reader(block.k, layer, norm, choice, read, None)
        self._fit_reader(block.v, layer, norm, choice, read, None)
        self._fit_writer(
            block.o,
            layer,
            2 * layer + 1,
            f"{block.head_space} {block.vo_space}",
            decoder(contexts.cov("all"), choice.push),
            inputs=lambda z: walk.attend(
                self.target, block, walk.apply(self.target, block.attention_norm, z)
            ),
            after=after,
        )

    def _mlp(self, layer: int) -> None:
        block, union = self.layout.blocks[layer], self.union
        units = Moments(all=sum(union.units(layer, "up")))
        after = []
        for streams in self.x:
            hidden, out = union.mlp(layer, streams)
            after.append(out)
            weights = self._weights(2 * layer + 2, len(streams[0]))
            units.update(weights, all=torch.cat([rows(u) for u in hidden], dim=1))
        choice = choose_units(
            union, layer, units.cov("all"), union.outputs(self.mixes, layer, "down"),
            self.shape.intermediate_size, self.settings.units,
        )  # fmt: skip
        read = self._reading(block.mlp_norm, 2 * layer + 2)
        self._fit_reader(block.up, layer, block.mlp_norm, choice, read, None)
        self._fit_writer(
            block.down,
            layer,
            2 * layer + 2,
            block.mlp_space,
            decoder(units.cov("all"), choice.push),
            inputs=lambda z: walk.mlp(self.target, block, z)[0],
            after=after,
        )

    # -- the two kinds of fit ---------------------------------------------------------------

    def _reading(self, norm: str, depth: int) -> Moments:
        """Return moments of the parents' (p0, …) and the target's (t) normed streams."""
        moments = Moments(**_sites(self.union.widths), t=self.width)
        for streams, z in zip(self.x, self.z, strict=True):
            seen = [rows(x) for x in self.union.normed(norm, streams)]
            own = rows(walk.apply(self.target, norm, z))
            moments.update(self._weights(depth, len(z)), **_sites(seen), t=own)
        return moments

    def _readback(self, p: int, moments: Moments, norm: str) -> Tensor:
        """Return s·γ·T_p·D (d_p, m): the parent's normed stream as read from the target's.

        The scale s is the least-squares one, which absorbs √(d_p / m) and lost energy.
        """
        gain = self.union.states[p][f"{norm}.weight"].double()
        guess = gain[:, None] * self.readbacks[p]
        predicted = guess @ moments.cov("t")
        scale = (moments.cov(f"p{p}", "t") * guess).sum() / (predicted * guess).sum()
        return guess * scale

    def _fit_reader(
        self,
        name: str,
        layer: int,
        norm: str,
        choice: Choice,
        moments: Moments,
        scales: list[float] | None,
    ) -> None:
        """Fit a layer that reads the stream to the chosen units' pre-activations."""
        weights, priors, shifts = [], [], []
        for p, (state, atlas) in enumerate(zip(self.union.states, self.union.atlases, strict=True)):
            names = [n for n in (f"{name}.weight", f"{name}.bias") if n in atlas.axes]
            moved = transform(
                {n: state[n].double() for n in names}, atlas, choice.maps[p], only=names
            )
            factor = 1.0 if scales is None else scales[p]
            weights.append(moved[f"{name}.weight"] * factor)
            priors.append(weights[p] @ self._readback(p, moments, norm))
            shifts += [moved[n] * factor for n in names[1:]]
        sites = [f"p{p}" for p in range(len(weights))]
        means = [w @ moments.mean(site) for site, w in zip(sites, weights, strict=True)]
        prior = _total(priors)
        if shifts:
            moment = moments.cov
        else:  # the norm's bias of ones is the intercept, see _attention
            moment, ones = moments.second, torch.ones(self.width, dtype=torch.float64) / self.width
            prior = prior @ centring(self.width)
            prior += torch.outer(_total(means) - prior @ moments.mean("t"), ones)
        cross = _total(w @ moment(site, "t") for site, w in zip(sites, weights, strict=True))
        fitted = ridge(cross, moment("t"), prior, self.settings.ridge)
        self._write(name, fitted, _total(means + shifts) - fitted @ moments.mean("t"))
        variance = _total(
            (a @ moment(s, t) * b).sum()
            for s, a in zip(sites, weights, strict=True)
            for t, b in zip(sites, weights, strict=True)
        )
        missed = variance - 2 * (fitted * cross).sum() + (fitted @ moment("t") * fitted).sum()
        self._record(layer, name, float(missed), float(variance), choice.sources)

    def _fit_writer(
        self,
        name: str,
        layer: int,
        depth: int,
        space: str,
        read: Tensor,
        *,
        inputs: Callable[[Tensor], Tensor],
        after: list[list[Tensor]],
    ) -> None:
        """Fit a layer that writes the stream to what is missing there: E y_after - z_before.

        read: the parents' units as read from the target's (Σ n_p, m).
        """
        moments = Moments(goal=self.width, t=read.shape[1], y=self.width)
        kept = []
        for streams, z in zip(after, self.z, strict=True):
            x = inputs(z)
            kept.append(x)
            y = self._mixed(streams)
            moments.update(self._weights(depth, len(z)), goal=y - rows(z), t=rows(x), y=y)
        key = f"{name}.weight"
        parts = torch.split(read, [state[key].shape[1] for state in self.union.states])
        prior = self._transported([key], [{space: LinearMap(part, part)} for part in parts])[key]
        missed = self._solve(name, moments, prior)
        self._record(layer, name, missed, float(moments.cov("goal").trace()))
        self.stream_errors.append(_share(missed, float(moments.cov("y").trace())))
        module = self.target.get_submodule(name)
        self.z = [z + module(x) for z, x in zip(self.z, kept, strict=True)]
        self.x = after

    def _head(self) -> None:
        """Fit the head to the parents' weighted mean logits (their mean log-probabilities)."""
        layout, union = self.layout, self.union
        total = sum(p.weight for p in union.parents)
        weights = [p.weight / total for p in union.parents]
        key = f"{layout.head}.weight"
        classes = len(self.target.get_parameter(key))
        moments = Moments(goal=classes, t=self.width, **_sites(union.widths))
        for streams, z in zip(self.x, self.z, strict=True):
            tops = [
                walk.read_out(p.model, layout, x)
                for p, x in zip(union.parents, streams, strict=True)
            ]
            goal = _total(
                w * walk.apply(p.model, layout.head, top).double()
                for w, p, top in zip(weights, union.parents, tops, strict=True)
            )
            own = walk.read_out(self.target, layout, z)
            moments.update(goal=goal, t=own, **_sites(tops))
        prior = _total(
            w * union.states[p][key].double() @ self._readback(p, moments, layout.final_norm)
            for p, w in enumerate(weights)
        )
        missed = self._solve(layout.head, moments, prior)
        self._record(len(layout.blocks), layout.head, missed, float(moments.cov("goal").trace()))

    # -- small helpers ----------------------------------------------------------------------

    def _solve(self, name: str, moments: Moments, prior: Tensor) -> float:
        """Fit `goal` from `t`, write the layer, and return the variance that is missed."""
        cross, gram = moments.cov("goal", "t"), moments.cov("t")
        fitted = ridge(cross, gram, prior, self.settings.ridge)
        self._write(name, fitted, moments.mean("goal") - fitted @ moments.mean("t"))
        goal = moments.cov("goal").trace()
        return float(goal - 2 * (fitted * cross).sum() + (fitted @ gram * fitted).sum())

    def _write(self, name: str, weight: Tensor, bias: Tensor) -> None:
        module = self.target.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        module.weight.copy_(weight)
        if isinstance(module.bias, Tensor):
            module.bias.copy_(bias)

    def _record(
        self, layer: int, name: str, missed: float, variance: float, sources: Sources = ()
    ) -> None:
        self.parts.append(Part(layer, name.rsplit(".", 1)[-1], _share(missed, variance), sources))


def _sites(values: Sequence[_T]) -> dict[str, _T]:
    """Return the parents' values under the names of their sites."""
    return {f"p{i}": value for i, value in enumerate(values)}


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)).sum(0)


def _share(part: float, whole: float) -> float:
    return max(part, 0.0) / whole if whole > 0 else 0.0
