"""Sequential least-squares refit (fusion.md §5): build the target layer by layer in closed form.

Several parents are treated as one wide network. Its stream is their consensus y = Σ_p K_p x_p,
its heads and MLP units are all the parents' own, each writing K_p W to y. The target keeps the
units that explain the rest best, and every layer is then solved against what the already-built
part of the target really produces. Rows are weighted by what they matter to the parents' logits
(see `importance`): after the last attention only the readout token does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from slimfuse.families import Block, Family
from slimfuse.fuse import walk
from slimfuse.fuse.importance import token_importance
from slimfuse.fuse.solve import (
    decoder,
    greedy_groups,
    reduce_scores,
    reduce_values,
    ridge,
)
from slimfuse.fuse.stream import (
    Consensus,
    StreamMap,
    StreamMethod,
    centring,
    consensus,
    stream_map,
)
from slimfuse.moments import Moments
from slimfuse.progress import track
from slimfuse.saliency import magnitude
from slimfuse.spaces import Atlas, LinearMap, NestedMap, transform

Units = Literal["cholesky", "magnitude"]
Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Parent:
    """A trained model with its share of the fusion."""

    name: str
    model: nn.Module
    weight: float = 1.0


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
    sources: tuple[tuple[str, int], ...] = ()


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
        self.parents, self.target, self.settings = parents, target, settings
        self.batches, self.n_batches = batches, n_batches
        self.layout = family.layout(target.config)
        self.layouts = [family.layout(p.model.config) for p in parents]
        self.atlases: list[Atlas] = [family.atlas(p.model.config) for p in parents]
        self.states: list[dict[str, Tensor]] = [dict(p.model.state_dict()) for p in parents]
        self.head_dims = [family.head_dims(p.model.config) for p in parents]
        self.widths = [family.shape(p.model.config).hidden_size for p in parents]
        self.shape = family.shape(target.config)
        self.query_scales = [family.query_scale(p.model.config, target.config) for p in parents]
        self.target_dims = family.head_dims(target.config)
        self.parts: list[Part] = []
        self.stream_errors: list[float] = []
        # the cached streams, one entry a batch: every parent's and the target's
        self.x: list[list[Tensor]] = []
        self.z: list[Tensor] = []

    def run(self) -> Fusion:
        self.importance = token_importance(
            [p.model for p in self.parents], self.layouts, self.batches()
        )
        self.consensus = consensus(
            self._joint_stream(), self.widths, [p.weight for p in self.parents]
        )
        self.map = stream_map(
            self.consensus.second, self.shape.hidden_size, self.settings.stream,
            reg=self.settings.reg,
        )  # fmt: skip
        self.mixes = [self.map.encode @ mix for mix in self.consensus.mixes]
        self.readbacks = [back @ self.map.decode for back in self.consensus.readbacks]
        self._embed()
        steps = 2 * len(self.layout.blocks)
        with track("fusing layers", steps) as tell:
            for layer in range(len(self.layout.blocks)):
                self._attention(layer)
                tell(2 * layer + 1)
                self._mlp(layer)
                tell(2 * layer + 2)
        self._head()
        return Fusion(self.consensus, self.map, tuple(self.parts), tuple(self.stream_errors))

    # -- the stream -------------------------------------------------------------------------

    def _joint_stream(self) -> Tensor:
        """Return E[w x xᵀ / |P x_1|²] of the parents' joint streams over all depths and tokens."""
        moments = Moments(joint=sum(self.widths))
        project = centring(self.widths[0])
        with track("reading the parents' streams", self.n_batches) as tell:
            for i, batch in enumerate(self.batches()):
                runs = [
                    walk.streams(p.model, layout, batch)
                    for p, layout in zip(self.parents, self.layouts, strict=True)
                ]
                for depth, parallel in enumerate(zip(*runs, strict=True)):
                    rows = torch.cat([_rows(x) for x in parallel], dim=1)
                    norm = (rows[:, : self.widths[0]] @ project).square().sum(1)
                    weights = self._weights(depth, len(batch)) / norm.clamp_min(1e-12)
                    moments.update(weights, joint=rows)
                tell(i + 1)
        return moments.second("joint")

    def _weights(self, depth: int, samples: int) -> Tensor:
        """Return the importance of every row (samples·tokens,) at one depth."""
        return self.importance[depth].repeat(samples)

    def _mixed(self, streams: Sequence[Tensor]) -> Tensor:
        """Return rows (tokens, m) of E y for the parents' streams."""
        return _total(_rows(x) @ mix.T for x, mix in zip(streams, self.mixes, strict=True))

    def _embed(self) -> None:
        """Write the embeddings, which move exactly, and start the cached streams."""
        moved: dict[str, Tensor] = {}
        for state, atlas, mix in zip(self.states, self.atlases, self.mixes, strict=True):
            maps = {self.layout.stream_space: LinearMap(mix.T, mix.T)}
            for name, value in transform(
                state, atlas, maps, only=self.layout.embed_parameters
            ).items():
                moved[name] = moved[name] + value if name in moved else value
        for name, value in moved.items():
            self.target.get_parameter(name).copy_(value)
        for batch in self.batches():
            self.x.append(
                [
                    walk.embed(p.model, layout, batch)
                    for p, layout in zip(self.parents, self.layouts, strict=True)
                ]
            )
            self.z.append(walk.embed(self.target, self.layout, batch))

    # -- attention --------------------------------------------------------------------------

    def _attention(self, layer: int) -> None:
        block = self.layout.blocks[layer]
        after, contexts, scores = self._parents_attention(layer)
        read = self._reading(block.attention_norm, 2 * layer)
        nested, chosen = self._choose_heads(layer, contexts, scores)
        sources = tuple((self.parents[p].name, h) for p, h in chosen)
        for name, factor in ((block.q, self.query_scales), (block.k, None), (block.v, None)):
            self._fit_reader(name, layer, nested, read, factor, sources)
        axis = f"{block.head_space} {block.vo_space}"
        self._fit_writer(
            block.o,
            layer,
            axis,
            contexts,
            self._pushes(layer, nested),
            inputs=lambda z: walk.attend(
                self.target, block, walk.apply(self.target, block.attention_norm, z)
            ),
            after=after,
        )

    def _parents_attention(
        self, layer: int
    ) -> tuple[list[list[Tensor]], Moments, list[list[tuple[Tensor, Tensor]]]]:
        """Run the parents' attention; return streams after it, moments of contexts, of q and k."""
        sizes = [len(self._weight(p, layer, "v")) for p in range(len(self.parents))]
        contexts = Moments(all=sum(sizes))
        norms = [Moments(x=d) for d in self.widths]
        after = []
        for streams in self.x:
            normed = [
                walk.apply(p.model, lay.blocks[layer].attention_norm, x)
                for p, lay, x in zip(self.parents, self.layouts, streams, strict=True)
            ]
            heads = [
                walk.attend(p.model, lay.blocks[layer], x)
                for p, lay, x in zip(self.parents, self.layouts, normed, strict=True)
            ]
            weights = self._weights(2 * layer + 1, len(streams[0]))
            contexts.update(weights, all=torch.cat([_rows(h) for h in heads], dim=1))
            for moments, x in zip(norms, normed, strict=True):
                moments.update(x=_rows(x))
            after.append(
                [
                    x + walk.apply(p.model, lay.blocks[layer].o, h)
                    for p, lay, x, h in zip(self.parents, self.layouts, streams, heads, strict=True)
                ]
            )
        scores = [self._head_scores(p, layer, norms[p]) for p in range(len(self.parents))]
        return after, contexts, scores

    def _head_scores(self, p: int, layer: int, norm: Moments) -> list[tuple[Tensor, Tensor]]:
        """Return the second moment of q and the covariance of k for every head of a parent.

        Keys enter centred, because what is constant over keys leaves the softmax as it was.
        """
        dims = self.head_dims[p]
        q, k = self._weight(p, layer, "q"), self._weight(p, layer, "k")
        bias = self._bias(p, layer, "q")
        mean = q @ norm.mean("x") + bias
        queries = q @ norm.cov("x") @ q.T + torch.outer(mean, mean)
        keys = k @ norm.cov("x") @ k.T
        cuts = [slice(h, h + dims) for h in range(0, len(q), dims)]
        return [(queries[c, c], keys[c, c]) for c in cuts]

    def _choose_heads(
        self, layer: int, contexts: Moments, scores: list[list[tuple[Tensor, Tensor]]]
    ) -> tuple[list[dict[str, LinearMap | NestedMap]], list[tuple[int, int]]]:
        """Return each parent's maps of heads and their units, and every target's (parent, head)."""
        block = self.layout.blocks[layer]
        cov = contexts.cov("all")
        out = self._outputs(layer, "o")
        owners = [(p, h) for p, s in enumerate(scores) for h in range(len(s))]
        groups, offset = [], 0
        for p, _ in owners:
            groups.append(torch.arange(offset, offset + self.head_dims[p]))
            offset += self.head_dims[p]
        order = self._keep(cov, out, groups, self.shape.num_attention_heads)
        chosen = [owners[i] for i in order]
        maps: list[dict[str, LinearMap | NestedMap]] = []
        for p, parent_scores in enumerate(scores):
            picks = torch.zeros(len(parent_scores), len(order), dtype=torch.float64)
            qk, vo = [], []
            for h, (query, key) in enumerate(parent_scores):
                index = groups[owners.index((p, h))]
                if (p, h) in chosen:
                    picks[h, chosen.index((p, h))] = 1
                qk.append(self._score_map(query, key, self.head_dims[p]))
                vo.append(self._value_map(cov[index][:, index], out[:, index], self.head_dims[p]))
            maps.append(
                {
                    block.head_space: LinearMap(picks, picks),
                    block.qk_space: NestedMap(qk),
                    block.vo_space: NestedMap(vo),
                }
            )
        return maps, chosen

    def _score_map(self, query: Tensor, key: Tensor, dims: int) -> LinearMap:
        if dims == self.target_dims:
            return LinearMap(torch.eye(dims).double(), torch.eye(dims).double())
        return LinearMap(*reduce_scores(query, key, self.target_dims))

    def _value_map(self, cov: Tensor, out: Tensor, dims: int) -> LinearMap:
        if dims == self.target_dims:
            return LinearMap(torch.eye(dims).double(), torch.eye(dims).double())
        push = reduce_values(cov, out, self.target_dims)
        return LinearMap(push, decoder(cov, push))

    def _pushes(self, layer: int, nested: list[dict[str, LinearMap | NestedMap]]) -> Tensor:
        """Return what every parent's context units give to the target's (Σ n_p, m)."""
        from slimfuse.spaces.transform import axis_matrix

        block = self.layout.blocks[layer]
        axis = self.atlases[0].axes[f"{block.v}.weight"][0]
        return torch.cat(
            [
                axis_matrix(axis, atlas, maps)
                for atlas, maps in zip(self.atlases, nested, strict=True)
            ]
        )

    # -- MLP --------------------------------------------------------------------------------

    def _mlp(self, layer: int) -> None:
        block = self.layout.blocks[layer]
        sizes = [len(self._weight(p, layer, "up")) for p in range(len(self.parents))]
        units = Moments(all=sum(sizes))
        after = []
        for streams in self.x:
            runs = [
                walk.mlp(p.model, lay.blocks[layer], x)
                for p, lay, x in zip(self.parents, self.layouts, streams, strict=True)
            ]
            weights = self._weights(2 * layer + 2, len(streams[0]))
            units.update(weights, all=torch.cat([_rows(u) for u, _ in runs], dim=1))
            after.append([x + out for x, (_, out) in zip(streams, runs, strict=True)])
        singles = list(torch.arange(sum(sizes))[:, None])
        order = self._keep(
            units.cov("all"), self._outputs(layer, "down"), singles, self.shape.intermediate_size
        )
        push = torch.eye(sum(sizes), dtype=torch.float64)[:, order]
        parts = torch.split(push, sizes)
        maps: list[dict[str, LinearMap | NestedMap]] = [
            {block.mlp_space: LinearMap(part, part)} for part in parts
        ]
        owners = [(p.name, u) for p, n in zip(self.parents, sizes, strict=True) for u in range(n)]
        read = self._reading(block.mlp_norm, 2 * layer + 2)
        self._fit_reader(block.up, layer, maps, read, None, tuple(owners[i] for i in order))
        self._fit_writer(
            block.down,
            layer,
            block.mlp_space,
            units,
            push,
            inputs=lambda z: walk.mlp(self.target, block, z)[0],
            after=after,
        )

    # -- the two kinds of fit ---------------------------------------------------------------

    def _reading(self, norm: str, depth: int) -> Moments:
        """Return moments of the parents' and the target's normed streams before one sublayer."""
        names = [f"p{i}" for i in range(len(self.parents))]
        moments = Moments(**dict(zip(names, self.widths, strict=True)), t=self.shape.hidden_size)
        for streams, z in zip(self.x, self.z, strict=True):
            rows = {
                name: _rows(walk.apply(p.model, norm, s))
                for name, p, s in zip(names, self.parents, streams, strict=True)
            }
            moments.update(self._weights(depth, len(z)), **rows, t=_rows(walk.apply(self.target, norm, z)))
        return moments

    def _readback(self, p: int, moments: Moments, gain: Tensor) -> Tensor:
        """Return s·γ·T_p·D (d_p, m): the parent's normed stream as read from the target's.

        The scale s is the least-squares one, which absorbs √(d_p / m) and lost energy.
        """
        guess = gain.double()[:, None] * self.readbacks[p]
        predicted = guess @ moments.cov("t")
        scale = (moments.cov(f"p{p}", "t") * guess).sum() / (predicted * guess).sum()
        return guess * scale

    def _fit_reader(
        self,
        name: str,
        layer: int,
        maps: list[dict[str, LinearMap | NestedMap]],
        moments: Moments,
        scale: list[float] | None,
        sources: tuple[tuple[str, int], ...],
    ) -> None:
        """Fit a layer that reads the stream to the chosen units' pre-activations."""
        width = self.shape.hidden_size
        norm = self._norm_of(name, layer)
        rows, priors, means = [], [], []
        for p, (state, atlas) in enumerate(zip(self.states, self.atlases, strict=True)):
            names = [n for n in (f"{name}.weight", f"{name}.bias") if n in atlas.axes]
            moved = transform({n: state[n].double() for n in names}, atlas, maps[p], only=names)
            factor = 1.0 if scale is None else scale[p]
            weight = moved[f"{name}.weight"] * factor
            rows.append(weight)
            bias = moved.get(f"{name}.bias")
            gain = state[f"{norm}.weight"]
            priors.append(weight @ self._readback(p, moments, gain))
            means.append(weight @ moments.mean(f"p{p}"))
            if bias is not None:
                means.append(bias * factor)
        cross = _total(w @ moments.cov(f"p{p}", "t") for p, w in enumerate(rows))
        prior, mean, gram = _total(priors), _total(means), moments.cov("t")
        variance = sum(
            float((a @ moments.cov(f"p{p}", f"p{q}") * b).sum())
            for p, a in enumerate(rows)
            for q, b in enumerate(rows)
        )
        assert prior.shape[1] == width
        fitted = ridge(cross, gram, prior, self.settings.ridge)
        self._write(name, fitted, mean - fitted @ moments.mean("t"))
        missed = (
            variance - 2 * float((fitted * cross).sum()) + float((fitted @ gram * fitted).sum())
        )
        self._record(layer, name, missed, variance, sources)

    def _fit_writer(
        self,
        name: str,
        layer: int,
        space: str,
        units: Moments,
        push: Tensor,
        *,
        inputs: Callable[[Tensor], Tensor],
        after: list[list[Tensor]],
    ) -> None:
        """Fit a layer that writes the stream to what is missing there: E y_after - z_before."""
        moments = Moments(goal=self.shape.hidden_size, t=push.shape[1], y=self.shape.hidden_size)
        depth = 2 * layer + (2 if name == self.layout.blocks[layer].down else 1)
        kept = []
        for streams, z in zip(after, self.z, strict=True):
            x = inputs(z)
            kept.append(x)
            y = self._mixed(streams)
            moments.update(self._weights(depth, len(z)), goal=y - _rows(z), t=_rows(x), y=y)
        sizes = [state[f"{name}.weight"].shape[1] for state in self.states]
        read = torch.split(decoder(units.cov("all"), push), sizes)
        priors = []
        for p, (state, atlas, mix) in enumerate(
            zip(self.states, self.atlases, self.mixes, strict=True)
        ):
            key = f"{name}.weight"
            maps = {
                self.layout.stream_space: LinearMap(mix.T, mix.T),
                space: LinearMap(read[p], read[p]),
            }
            moved = transform({key: state[key].double()}, atlas, maps, only=[key])
            priors.append(moved[key])
        cross, gram = moments.cov("goal", "t"), moments.cov("t")
        fitted = ridge(cross, gram, _total(priors), self.settings.ridge)
        bias = moments.mean("goal") - fitted @ moments.mean("t")
        self._write(name, fitted, bias)
        missed = (
            moments.cov("goal") - fitted @ cross.T - cross @ fitted.T + fitted @ gram @ fitted.T
        )
        self._record(layer, name, float(missed.trace()), float(moments.cov("goal").trace()))
        self.stream_errors.append(_share(float(missed.trace()), float(moments.cov("y").trace())))
        module = self.target.get_submodule(name)
        self.z = [z + module(x) for z, x in zip(self.z, kept, strict=True)]
        self.x = after

    def _head(self) -> None:
        """Fit the head to the parents' weighted mean logits (their mean log-probabilities)."""
        layout = self.layout
        weights = [p.weight / sum(q.weight for q in self.parents) for p in self.parents]
        classes = len(self.target.get_parameter(f"{layout.head}.weight"))
        names = {f"p{i}": d for i, d in enumerate(self.widths)}
        moments = Moments(goal=classes, t=self.shape.hidden_size, **names)
        for streams, z in zip(self.x, self.z, strict=True):
            tops = [
                walk.read_out(p.model, layout, x)
                for p, x in zip(self.parents, streams, strict=True)
            ]
            goal = _total(
                w * walk.apply(p.model, layout.head, top).double()
                for w, p, top in zip(weights, self.parents, tops, strict=True)
            )
            moments.update(
                goal=goal,
                t=walk.read_out(self.target, layout, z),
                **dict(zip(names, tops, strict=True)),
            )
        prior = _total(
            w * self.states[p][f"{layout.head}.weight"].double()
            @ self._readback(p, moments, self.states[p][f"{layout.final_norm}.weight"])
            for p, w in enumerate(weights)
        )  # fmt: skip
        cross, gram = moments.cov("goal", "t"), moments.cov("t")
        fitted = ridge(cross, gram, prior, self.settings.ridge)
        self._write(layout.head, fitted, moments.mean("goal") - fitted @ moments.mean("t"))
        missed = (
            moments.cov("goal") - fitted @ cross.T - cross @ fitted.T + fitted @ gram @ fitted.T
        )
        self._record(
            len(layout.blocks),
            layout.head,
            float(missed.trace()),
            float(moments.cov("goal").trace()),
        )

    # -- small helpers ----------------------------------------------------------------------

    def _keep(self, cov: Tensor, out: Tensor, groups: list[Tensor], keep: int) -> list[int]:
        if self.settings.units == "magnitude":
            return [int(i) for i in magnitude(out, groups).topk(keep).indices]
        return sorted(greedy_groups(cov, out, groups, keep))

    def _outputs(self, layer: int, part: str) -> Tensor:
        """Return what all parents' units write to the target's stream (m, Σ n_p)."""
        return torch.cat(
            [mix @ self._weight(p, layer, part) for p, mix in enumerate(self.mixes)], dim=1
        )

    def _weight(self, p: int, layer: int, part: str) -> Tensor:
        name: str = getattr(self.layouts[p].blocks[layer], part)
        return self.states[p][f"{name}.weight"].double()

    def _bias(self, p: int, layer: int, part: str) -> Tensor:
        name: str = getattr(self.layouts[p].blocks[layer], part)
        bias = self.states[p].get(f"{name}.bias")
        return torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()

    def _norm_of(self, name: str, layer: int) -> str:
        block: Block = self.layout.blocks[layer]
        return block.mlp_norm if name == block.up else block.attention_norm

    def _write(self, name: str, weight: Tensor, bias: Tensor) -> None:
        module = self.target.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        module.weight.copy_(weight)
        if isinstance(module.bias, Tensor):
            module.bias.copy_(bias)

    def _record(
        self,
        layer: int,
        name: str,
        missed: float,
        variance: float,
        sources: tuple[tuple[str, int], ...] = (),
    ) -> None:
        self.parts.append(Part(layer, name.rsplit(".", 1)[-1], _share(missed, variance), sources))


def _rows(x: Tensor) -> Tensor:
    """Return tokens as float64 rows (batch·tokens, d)."""
    return x.reshape(-1, x.shape[-1]).double()


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)).sum(0)


def _share(part: float, whole: float) -> float:
    return max(part, 0.0) / whole if whole > 0 else 0.0
