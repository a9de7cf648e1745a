"""Builds a target model block by block beside the parents, each layer by its own least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from slimfuse.errors import SlimfuseError
from slimfuse.families import Family
from slimfuse.fuse import walk
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.choice import Choice, Choosing, Scores, choose_heads, choose_units, keep
from slimfuse.fuse.fits import Draw, Fit, Ridge, Statistics, fit
from slimfuse.fuse.labels import Goals
from slimfuse.fuse.post_norm import PostNorm
from slimfuse.fuse.readout import fit_head, fit_pooler, statistics
from slimfuse.fuse.running import Running
from slimfuse.fuse.solve import decoder
from slimfuse.fuse.stream import centring
from slimfuse.fuse.union import Member, Union
from slimfuse.fuse.walk import flat, rows
from slimfuse.moments import Moments, precision
from slimfuse.spaces import AxisMap, LinearMap, transform

FIXED_RIDGE = 1e-3  # where leaving out isn't exact: layers without a bias
Sources = tuple[tuple[str, int, int], ...]
Held = tuple[Tensor, Tensor | None]
"""What a fit holds on to: weight, and bias where the layer may stay untouched."""


@dataclass(frozen=True)
class Part:
    """One fitted part: what share of its goal's variance was missed, and how it was fitted.

    sources: parent's name, its block and unit, of each unit. strength, left_out, kept: see
    `fits.Fit`, the errors as shares of the goal's variance.
    """

    layer: int
    part: str
    error: float
    strength: float | str
    left_out: float | None = None
    kept: float | None = None
    sources: Sources = ()


class Building(Choosing, Protocol):
    """The settings that a builder asks for."""

    @property
    def ridge(self) -> Ridge:
        """Strength of the fits; None: by leaving out."""


class Builder:
    """One walk through parents and target, every layer of the target fitted on the way.

    mixes: (m, d_p) each, the target's stream = Σ_p mix_p x_p; readbacks: (d_p, m) each. Call
    `embed`, then each block's `attention` and `mlp`, then `head`.
    """

    norms_stay = False
    """Whether a post-norm target keeps the gains and shifts that it has."""

    def __init__(
        self,
        union: Union,
        target: nn.Module,
        family: Family,
        cache: StreamCache,
        settings: Building,
        draw: Draw,
        mixes: list[Tensor],
        readbacks: list[Tensor],
    ) -> None:
        self.union, self.target, self.settings = union, target, settings
        self.layout = family.layout(target.config)
        self.shape = family.shape(target.config)
        self.head_dims = family.head_dims(target.config)
        self.query_scales = [
            family.query_scale(p.model.config, target.config) for p in union.parents
        ]
        self.mixes, self.readbacks = mixes, readbacks
        self.draw = draw
        self.run = Running(union, target, self.layout, cache, draw)
        self.sums = PostNorm(union, self.run, target, mixes, norms_stay=self.norms_stay)
        self.dtype = next(target.parameters()).dtype
        self.parts: list[Part] = []
        self.stream_errors: list[float] = []

    def embed(self, batches: Iterable[Tensor]) -> None:
        """Write the embeddings, which move exactly up to a norm, and start the streams."""
        everyone = [Member(p, 0) for p in range(len(self.union))]
        if self.union.post_norm:  # what the parents' sums are divided by comes first
            batches = list(batches)
            self.run.start_parents(batches)
            self.sums.aim(self.layout.embed_norm)
        for name in self.layout.embed_parameters:
            value = self._transported(everyone, [name] * len(everyone))
            self.target.get_parameter(name).copy_(value)
        if self.union.post_norm:
            self.run.start_sums(batches)
            self.sums.settle(self.layout.embed_norm, 0)
        else:
            self.run.start(batches)

    def attention(self, index: int) -> None:
        """Build a block's attention."""
        block, union, members = self.layout.blocks[index], self.union, self.union.members(index)
        if self.target.get_submodule(block.q).bias is None and not self.norms_stay:
            assert not union.post_norm, "only a norm's shift stands for a reader's bias"
            # what it normalises is orthogonal to the ones, so they stand for a bias of the readers
            self.target.get_parameter(f"{block.attention_norm}.bias").fill_(1)
        contexts = self._moments(all=sum(union.units(members, "v")))
        read, ask = self._readings(members), self._readings(members)
        for b in range(len(self.run.sizes)):
            seen, heads = self.run.attend(members, b)
            own = self.run.own(block.attention_norm, b)
            self._see(read, 2 * index, b, [*seen, own])
            # a query, and what a head wrote, count by their own token after the attention
            self._see(ask, 2 * index + 1, b, [*seen, own])
            self._see(contexts, 2 * index + 1, b, heads)
        scores = union.head_scores(members, ask, read)
        choice = self._choose_heads(members, contexts.cov("all"), scores)
        norm = "attention_norm"
        self._fit_reader(index, "q", norm, members, choice, ask, 2 * index + 1)
        self._fit_reader(index, "k", norm, members, choice, read, 2 * index)
        self._fit_reader(index, "v", norm, members, choice, read, 2 * index)
        self.run.forget(members, "i")
        self._fit_writer(index, "o", members, choice, contexts)

    def mlp(self, index: int) -> None:
        """Build a block's MLP."""
        block, union, members = self.layout.blocks[index], self.union, self.union.members(index)
        units = self._moments(all=sum(union.units(members, "up")))
        read = self._readings(members)
        for b in range(len(self.run.sizes)):
            self._see(units, 2 * index + 2, b, self.run.activate(members, b))
            seen = self.run.normed(members, "mlp_norm", b)
            self._see(read, 2 * index + 2, b, [*seen, self.run.own(block.mlp_norm, b)])
        choice = self._choose_units(members, units.cov("all"))
        self._fit_reader(index, "up", "mlp_norm", members, choice, read, 2 * index + 2)
        self.run.forget(members, "m")
        self._fit_writer(index, "down", members, choice, units)

    def head(self, goals: Goals) -> None:
        """Fit the head, and the pooler before it, to what `goals` makes of the parents' logits."""
        fit_head(self, goals)

    # -- what a repair does otherwise -------------------------------------------------------

    def _choose_heads(self, members: Sequence[Member], cov: Tensor, scores: Scores) -> Choice:
        out = self.union.outputs(self.mixes, members, "o")
        heads = self.shape.num_attention_heads
        return choose_heads(
            self.union, members, cov, out, scores, heads, self.head_dims, self.settings
        )

    def _choose_units(self, members: Sequence[Member], cov: Tensor) -> Choice:
        out = self.union.outputs(self.mixes, members, "down")
        return choose_units(
            self.union, members, cov, out, self.shape.intermediate_size, self.settings
        )

    def _choose_pooled(self, cov: Tensor, out: Tensor) -> Tensor:
        """Return what every pooled unit gives to the target's (Σ n, m); out: to the logits."""
        singles = list(torch.arange(len(cov))[:, None])
        kept = keep(self.settings.units, cov, out, singles, self.shape.hidden_size)
        return torch.eye(len(cov), dtype=torch.float64)[:, kept]

    def _fit_pooler(self, goals: Goals) -> list[Tensor]:
        return fit_pooler(self, goals)

    def _held(self, _name: str, transported: Callable[[], Tensor]) -> Held:
        return transported(), None

    # -- statistics -------------------------------------------------------------------------

    def _moments(self, **widths: int) -> Moments:
        return Moments(precision(sum(widths.values()), self.dtype), **widths)

    def _readings(self, members: Sequence[Member]) -> Moments:
        """Return moments for the members' (n0, …) and the target's (t) normed streams."""
        widths = {f"n{i}": self.union.widths[m.parent] for i, m in enumerate(members)}
        return self._moments(**widths, t=self.shape.hidden_size)

    def _see(self, moments: Moments, checkpoint: int, batch: int, parts: list[Tensor]) -> None:
        """Add a batch's tokens; parts: one a site, or all parts of the only site."""
        width = sum(moments.widths.values())
        places, weights = self.draw(checkpoint, batch, self.run.sizes[batch], width)
        values = [flat(x, places) for x in parts]
        if len(moments.widths) == 1:
            values = [torch.cat(values, dim=1)]
        moments.update(weights, **dict(zip(moments.widths, values, strict=True)))

    def _mixed(self, batch: int, places: Tensor) -> Tensor:
        """Return rows (r, m) of E y for the parents' streams at some tokens."""
        pairs = zip(self.run.streams(batch), self.mixes, strict=True)
        return _total(_product(flat(x, places), mix) for x, mix in pairs)

    def _missing(self, batch: int, places: Tensor, mixed: Tensor | None = None) -> Tensor:
        """Return rows (r, m) of what the target's stream lacks at some tokens, of E y `mixed`."""
        if self.union.post_norm:
            return self.sums.missing(batch, places)
        mixed = self._mixed(batch, places) if mixed is None else mixed
        return mixed - rows(self.run.stream(batch), places)

    def _transported(
        self,
        members: Sequence[Member],
        names: Sequence[str],
        others: Sequence[Mapping[str, AxisMap]] | None = None,
    ) -> Tensor:
        """Return the sum of one parameter of each member, written to what the target's is added to.

        others: maps of what is read.
        """
        moved = []
        for i, (member, name) in enumerate(zip(members, names, strict=True)):
            write = (self.sums.writes or self.mixes)[member.parent].T
            maps: dict[str, AxisMap] = {self.layout.stream_space: LinearMap(write, write)}
            maps |= {} if others is None else others[i]
            state, atlas = self.union.states[member.parent], self.union.atlases[member.parent]
            moved.append(transform({name: state[name].double()}, atlas, maps, only=[name])[name])
        return _total(moved)

    def _readback(self, moments: Moments, site: int, parent: int, gain: Tensor) -> Tensor:
        """Return s·γ·T_p·D (d_p, m): a normed stream of a parent as read from the target's.

        The scale s is the least-squares one, which absorbs √(d_p / m) and lost energy.
        """
        guess = gain.double()[:, None] * self.readbacks[parent]
        predicted = guess @ moments.cov("t")
        own = (predicted * guess).sum()
        if float(own) <= torch.finfo(own.dtype).tiny:  # what never varies says nothing of a scale
            return 0 * guess
        scale = (moments.cov(f"n{site}", "t") * guess).sum() / own
        return guess * scale

    # -- the two kinds of fit ---------------------------------------------------------------

    def _fit_reader(
        self,
        index: int,
        part: str,
        norm: str,
        members: Sequence[Member],
        choice: Choice,
        moments: Moments,
        checkpoint: int,
    ) -> None:
        """Fit a layer that reads the stream to the chosen units' pre-activations."""
        block, union = self.layout.blocks[index], self.union
        name: str = getattr(block, part)
        weights, shifts = [], []
        for i, member in enumerate(members):
            state, atlas = union.states[member.parent], union.atlases[member.parent]
            path: str = getattr(union.block(member), part)
            names = [n for n in (f"{path}.weight", f"{path}.bias") if n in atlas.axes]
            moved = transform(
                {n: state[n].double() for n in names}, atlas, choice.maps[i], only=names
            )
            factor = self.query_scales[member.parent] if part == "q" else 1.0
            weights.append(moved[names[0]] * factor)
            shifts += [moved[n] * factor for n in names[1:]]
        sites = [f"n{i}" for i in range(len(members))]
        means = [w @ moments.mean(site) for site, w in zip(sites, weights, strict=True)]

        def transported() -> Tensor:
            return _total(
                weights[i] @ self._readback(moments, i, m.parent, union.gain(m, norm))
                for i, m in enumerate(members)
            )

        prior, bias = self._held(name, transported)
        ridge, moment = self.settings.ridge, moments.cov
        if not shifts:  # the norm's bias of ones is the intercept, see `attention`
            ridge, moment = FIXED_RIDGE if ridge is None else ridge, moments.second
            ones = torch.ones(prior.shape[1], dtype=torch.float64) / prior.shape[1]
            prior = prior @ centring(prior.shape[1])
            prior += torch.outer(_total(means) - prior @ moments.mean("t"), ones)
        stats = Statistics(
            cross=_total(w @ moment(s, "t") for s, w in zip(sites, weights, strict=True)),
            gram=moment("t"),
            mean_in=moments.mean("t"),
            mean_goal=_total(means + shifts),
            variance=float(_total(
                (a @ moment(s, t) * b).sum()
                for s, a in zip(sites, weights, strict=True)
                for t, b in zip(sites, weights, strict=True)
            )),
            weight=moments.weight,
        )  # fmt: skip
        shift = _total(shifts) if shifts else torch.zeros(())

        def goals(batch: int, places: Tensor) -> Tensor:
            seen = self.run.normed(members, norm, batch)
            pairs = zip(seen, weights, strict=True)
            return shift + _total(_product(flat(x, places), w) for x, w in pairs)

        def inputs(batch: int, places: Tensor) -> Tensor:
            return rows(self.run.own(getattr(block, norm), batch), places)

        width = sum(moments.widths.values())
        groups = self.run.judges(checkpoint, width, inputs, goals)
        found = fit(stats, prior, ridge, groups, bias)
        self._write(name, found, index, stats.variance, choice.sources)

    def _fit_writer(
        self, index: int, part: str, members: Sequence[Member], choice: Choice, seen: Moments
    ) -> None:
        """Fit a layer that writes the stream to what is missing there: E y_after - z_before.

        seen: moments of all the members' units. In a post-norm target see `post_norm`.
        """
        block, cache, union = self.layout.blocks[index], self.run.cache, self.union
        name: str = getattr(block, part)
        checkpoint = 2 * index + (1 if part == "o" else 2)
        norm = self.layout.norm_at(checkpoint)
        if union.post_norm:
            self.sums.aim(norm)
        inner = choice.push.shape[1]
        moments = self._moments(goal=self.shape.hidden_size, t=inner, y=self.shape.hidden_size)
        width = sum(moments.widths.values())
        for b, samples in enumerate(self.run.sizes):
            z = self.run.stream(b)
            if part == "down":
                units = walk.mlp(self.target, block, z)[0]
            else:
                units = walk.attend(self.target, block, self.run.own(block.attention_norm, b))
            cache.put("u", b, units)
            places, weights = self.draw(checkpoint, b, samples, width)
            y = self._mixed(b, places)
            goal = self._missing(b, places, y)
            moments.update(weights, goal=goal, t=flat(units, places), y=y)

        def transported() -> Tensor:
            read = decoder(seen.cov("all"), choice.push)
            parts = torch.split(read, union.units(members, "v" if part == "o" else "up"))
            maps, names = [], []
            for member, share in zip(members, parts, strict=True):
                own = union.block(member)
                space = f"{own.head_space} {own.vo_space}" if part == "o" else own.mlp_space
                maps.append({space: LinearMap(share, share)})
                names.append(f"{getattr(own, part)}.weight")
            return self._transported(members, names, maps)

        def inputs(batch: int, places: Tensor) -> Tensor:
            return rows(cache.get("u", batch), places)

        prior, bias = self._held(name, transported)
        stats = statistics(moments, "goal", "t")
        groups = self.run.judges(checkpoint, width, inputs, self._missing)
        found = fit(stats, prior, self.settings.ridge, groups, bias)
        self._write(name, found, index, stats.variance)
        for b in range(len(self.run.sizes)):
            self.run.advance(name, b, cache.get("u", b))
            cache.drop("u", b)
        missed = _share(found.missed, float(moments.cov("y").trace()))
        self.stream_errors.append(self.sums.settle(norm, checkpoint) if union.post_norm else missed)

    def _write(
        self, name: str, found: Fit, layer: int, variance: float, sources: Sources = ()
    ) -> None:
        if not bool(found.weight.isfinite().all() and found.bias.isfinite().all()):
            raise SlimfuseError(
                f"the least squares of {name} have no finite answer",
                hint="give more calibration samples; check the parents' activations for nan",
            )
        module = self.target.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        module.weight.copy_(found.weight)
        if isinstance(module.bias, Tensor):
            module.bias.copy_(found.bias)
        left_out, kept = (
            None if error is None else _share(error, variance)
            for error in (found.left_out, found.kept)
        )
        part = name.rsplit(".", 1)[-1]
        error = _share(found.missed, variance)
        self.parts.append(Part(layer, part, error, found.strength, left_out, kept, sources))


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)).sum(0)


def _share(part: float, whole: float) -> float:
    return max(part, 0.0) / whole if whole > 0 else 0.0


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return float64 rows x Wᵀ; of wide float32 rows the product is float32."""
    kind = precision(x.shape[1], x.dtype)
    return (x.to(kind) @ weight.to(kind).T).double()
