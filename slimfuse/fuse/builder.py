"""Builds a target model block by block beside the parents, each layer by its own least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs
from slimfuse.errors import SlimfuseError
from slimfuse.families import Family
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.choice import (
    Choice,
    Choosing,
    Scores,
    choose_groups,
    choose_heads,
    choose_units,
    keep,
)
from slimfuse.fuse.fits import Draw, Fit, Ridge, Weighing, spread
from slimfuse.fuse.labels import Goals
from slimfuse.fuse.layers import (
    fit_projection,
    fit_reader,
    fit_writer,
    product,
    share_of,
    total,
)
from slimfuse.fuse.output import fit_output
from slimfuse.fuse.post_norm import PostNorm
from slimfuse.fuse.readout import fit_head, fit_pooler, fit_unread
from slimfuse.fuse.running import Running
from slimfuse.fuse.tables import slices
from slimfuse.fuse.union import Member, Union
from slimfuse.fuse.vocabulary import fit_vocabulary
from slimfuse.fuse.walk import flat, rows
from slimfuse.fuse.words import fit_words
from slimfuse.moments import Moments, precision
from slimfuse.spaces import AxisMap, LinearMap, Role, transform

Sources = tuple[tuple[str, int, int], ...]
Held = tuple[Tensor, Tensor | None]
"""What a fit holds on to: weight, and bias where the layer may stay untouched."""


@dataclass(frozen=True)
class Part:
    """One fitted part: what share of its goal's variance was missed, and how it was fitted.

    sources: parent's name, its block and unit, of each unit. strength, left_out, kept: see
    `fits.Fit`, the errors as shares of the goal's variance. role: q, k, v, o, up, gate or down of a
    block's, "" of others; saliency: see `Choice`.
    """

    layer: int
    part: str
    error: float
    strength: float | str
    left_out: float | None = None
    kept: float | None = None
    sources: Sources = ()
    role: str = ""
    saliency: float | None = None


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
    turns = True
    """Whether the stream may be turned so that a tied head fits better, see `vocabulary`."""

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
        self.layout, self.atlas = family.layout(target.config), family.atlas(target.config)
        self.shape = family.shape(target.config)
        self.head_dims = family.head_dims(target.config)
        self.query_scales = [
            family.query_scale(p.model.config, target.config) for p in union.parents
        ]
        self.mixes, self.readbacks = mixes, readbacks
        self.draw, self.ranks = draw, draw.ranks
        self.run = Running(union, target, self.layout, cache, draw)
        self.sums = PostNorm(union, self.run, target, mixes, norms_stay=self.norms_stay)
        self.dtype = next(target.parameters()).dtype
        self.rotation: Tensor | None = None  # of the stream, once the head is fitted
        self.kind = ""  # of the attention that is being built
        self.parts: list[Part] = []
        self.stream_errors: list[float] = []

    def embed(self, batches: Iterable[Inputs]) -> None:
        """Write the embeddings, which move exactly up to a norm, and start the streams."""
        everyone = [Member(p, 0) for p in range(len(self.union))]
        for name in self.layout.kept:
            self.target.get_parameter(name).copy_(self.union.states[0][name])
        if self.layout.projection:
            batches = list(batches)
            self.run.start_parents(batches)
            fit_projection(self, batches)
            self.run.start_own(batches)
        if self.layout.embed_norm:  # what the parents' sums are divided by comes first
            batches = list(batches)
            self.run.start_parents(batches)
            self.sums.aim(self.layout.embed_norm, means=self.layout.tied)
        if self.union.rms:  # the parents' gains go into the readers
            for path in self._norms():
                self.target.get_parameter(f"{path}.weight").fill_(1)
        for name in self.layout.embed_parameters:
            own = self.target.get_parameter(name)
            names, gains = [name] * len(everyone), None
            if name == self.layout.embed_parameters[0]:
                scales = [layout.embed_scale for layout in self.union.layouts]
                scales = [scale / self.layout.embed_scale for scale in scales]
                gains = list(torch.tensor(scales, dtype=torch.float64)[:, None])
            for part in self._parts(name):
                own[part] = self._transported(everyone, names, part=part, gains=gains)
        if self.layout.embed_norm:
            self.run.start_sums(batches)
            self.sums.settle(self.layout.embed_norm, 0)
        elif not self.layout.projection:
            self.run.start(batches)

    def attention(self, index: int) -> None:
        """Build a block's attention."""
        block, union, members = self.layout.blocks[index], self.union, self.union.members(index)
        self.kind = block.kind
        shifted = self.layout.norm == "layer" and not self._biased(block.q)
        if shifted and not self.norms_stay:
            assert not union.post_norm, "only a norm's shift stands for a reader's bias"
            # what it normalises is orthogonal to the ones, so they stand for a bias of the readers
            self.target.get_parameter(f"{block.attention_norm}.bias").fill_(1)
        contexts = self._moments(all=sum(union.units(members, "q")))
        read, ask = self._readings(members), self._readings(members)
        for b in range(len(self.run.sizes)):
            seen, heads = self.run.attend(members, b)
            own = self.run.own(block.attention_norm, b)
            self._see(read, 2 * index, b, [*seen, own], "reading")
            # a query, and what a head wrote, count by their own token after the attention
            self._see(ask, 2 * index + 1, b, [*seen, own], "reading")
            self._see(contexts, 2 * index + 1, b, heads)
        scores = union.head_scores(members, ask, read)
        energy = spread(contexts, "all", intercept=self._biased(block.o))
        choice = self._choose_heads(members, energy, scores)
        norm = "attention_norm"
        self._fit_reader(index, "q", norm, members, choice, ask, 2 * index + 1)
        self._fit_reader(index, "k", norm, members, choice, read, 2 * index)
        self._fit_reader(index, "v", norm, members, choice, read, 2 * index)
        self.run.forget(members, "i")
        fit_writer(self, index, "o", members, choice, contexts)

    def mlp(self, index: int) -> None:
        """Build a block's MLP."""
        block, union, members = self.layout.blocks[index], self.union, self.union.members(index)
        units = self._moments(all=sum(union.units(members, "up")))
        read = self._readings(members)
        for b in range(len(self.run.sizes)):
            self._see(units, 2 * index + 2, b, self.run.activate(members, b))
            seen = [*self.run.normed(members, "mlp_norm", b), self.run.own(block.mlp_norm, b)]
            self._see(read, 2 * index + 2, b, seen, "reading")
        energy = spread(units, "all", intercept=self._biased(block.down))
        choice = self._choose_units(members, energy)
        for part in ("up", "gate") if block.gate else ("up",):
            self._fit_reader(index, part, "mlp_norm", members, choice, read, 2 * index + 2)
        self.run.forget(members, "m")
        fit_writer(self, index, "down", members, choice, units)

    def head(self, goals: Goals | None) -> None:
        """Fit the head, and the pooler before it, to what `goals` makes of the parents' logits.

        Without a head (goals None) what the model gives is fitted, see `fit_output`.
        """
        if goals is None:
            fit_output(self)
        elif self.layout.transform is not None:
            fit_words(self, goals)
        elif self.layout.readout == "all":
            fit_vocabulary(self, goals)
        else:
            fit_head(self, goals)

    # -- what a repair does otherwise -------------------------------------------------------

    def _choose_heads(self, members: Sequence[Member], cov: Tensor, scores: Scores) -> Choice:
        out = self.union.outputs(self.mixes, members, "o")
        heads = self.atlas.spaces[self.layout.blocks[0].head_space].size
        if self.union.whole_heads:
            return choose_groups(self.union, members, cov, out, heads, self.settings, self.kind)
        return choose_heads(
            self.union, members, cov, out, scores, heads, self.head_dims, self.settings
        )

    def _choose_units(self, members: Sequence[Member], cov: Tensor) -> Choice:
        out = self.union.outputs(self.mixes, members, "down")
        return choose_units(
            self.union, members, cov, out, self.shape.intermediate_size, self.settings
        )

    def _choose_pooled(self, cov: Tensor, out: Tensor, count: int) -> Tensor:
        """Return what every pooled unit gives to the target's (Σ n, m); out: to the logits."""
        singles = list(torch.arange(len(cov))[:, None])
        kept = keep(self.settings.units, cov, out, singles, count)
        return torch.eye(len(cov), dtype=torch.float64)[:, kept]

    def _fit_pooler(self, goals: Goals) -> list[Tensor]:
        return fit_pooler(self, goals)

    def _fit_unread(self) -> None:
        fit_unread(self)

    def _held(self, _name: str, transported: Callable[[], Tensor]) -> Held:
        return transported(), None

    def _held_features(self, transported: Callable[[], Tensor]) -> Tensor:
        """Return how the parents' features are read from the target's (Σ d_p, m), as `_held`."""
        return transported()

    # -- statistics -------------------------------------------------------------------------

    def _moments(self, **widths: int) -> Moments:
        reduce = self.ranks.sum if self.ranks.of > 1 else None
        return Moments(precision(sum(widths.values()), self.dtype), reduce, **widths)

    def _readings(self, members: Sequence[Member]) -> Moments:
        """Return moments for the members' (n0, …) and the target's (t) normed streams."""
        widths = {f"n{i}": self.union.widths[m.parent] for i, m in enumerate(members)}
        return self._moments(**widths, t=self.shape.hidden_size)

    def _see(
        self,
        moments: Moments,
        checkpoint: int,
        batch: int,
        parts: list[Tensor],
        kind: Weighing = "stream",
    ) -> None:
        """Add a batch's tokens; parts: one a site, or all parts of the only site."""
        width = sum(moments.widths.values())
        places, weights = self.draw(checkpoint, batch, width, kind)
        values = [flat(x, places) for x in parts]
        if len(moments.widths) == 1:
            values = [torch.cat(values, dim=1)]
        moments.update(weights, **dict(zip(moments.widths, values, strict=True)))

    def _mixed(self, batch: int, places: Tensor) -> Tensor:
        """Return rows (r, m) of E y for the parents' streams at some tokens."""
        pairs = zip(self.run.streams(batch), self.mixes, strict=True)
        return total(product(flat(x, places), mix) for x, mix in pairs)

    def _missing(self, batch: int, places: Tensor, mixed: Tensor | None = None) -> Tensor:
        """Return rows (r, m) of what the target's stream lacks at some tokens, of E y `mixed`."""
        if self.union.post_norm:
            return self.sums.missing(batch, places)
        mixed = self._mixed(batch, places) if mixed is None else mixed
        return mixed - rows(self.run.stream(batch), places)

    def _norms(self) -> Iterator[str]:
        """Yield the paths of the norms that read the target's stream."""
        for block in self.layout.blocks:
            yield from (block.attention_norm, block.mlp_norm)
        yield self.layout.final_norm

    def _parts(self, name: str) -> Iterator[slice]:
        """Yield slices of a parameter of the target that can be moved one by one."""
        first, size = self.atlas.axes[name][0], len(self.target.get_parameter(name))
        fixed = all(leg.role is Role.FIXED for leg in first)
        yield from slices(size) if fixed else [slice(None)]

    def _biased(self, name: str) -> bool:
        """Return whether a layer or norm of the target has a bias."""
        return getattr(self.target.get_submodule(name), "bias", None) is not None

    def _transported(
        self,
        members: Sequence[Member],
        names: Sequence[str],
        others: Sequence[Mapping[str, AxisMap]] | None = None,
        part: slice | None = None,
        gains: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the sum of one parameter of each member, written to what the target's is added to.

        others: maps of what is read; part: of the first axis, where that is fixed; gains: (d_p,)
        or () each, which the parameter is multiplied by before.
        """
        moved = []
        for i, (member, name) in enumerate(zip(members, names, strict=True)):
            write = (self.sums.writes or self.mixes)[member.parent].T
            write = write if gains is None else gains[i][..., None] * write
            maps: dict[str, AxisMap] = {self.layout.stream_space: LinearMap(write, write)}
            maps |= {} if others is None else others[i]
            state, atlas = self.union.states[member.parent], self.union.atlases[member.parent]
            value = state[name] if part is None else state[name][part]
            moved.append(transform({name: value.double()}, atlas, maps, only=[name])[name])
        return total(moved)

    def _readback(
        self, moments: Moments, site: int, parent: int, gain: Tensor, *, intercept: bool = True
    ) -> Tensor:
        """Return s·γ·T_p·D (d_p, m): a normed stream of a parent as read from the target's.

        The scale s is the least-squares one, which absorbs √(d_p / m) and lost energy.
        """
        one = gain.double()[:, None] * self.readbacks[parent]
        copies = moments.widths["t"] // one.shape[1]  # a head may read several pooled streams
        guess: Tensor = torch.block_diag(*[one] * copies)
        predicted = guess @ spread(moments, "t", intercept=intercept)
        own = (predicted * guess).sum()
        if float(own) <= torch.finfo(own.dtype).tiny:  # what never varies says nothing of a scale
            return 0 * guess
        scale = (spread(moments, f"n{site}", "t", intercept=intercept) * guess).sum() / own
        return guess * scale

    # -- fits -------------------------------------------------------------------------------

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
        fit_reader(self, index, part, norm, members, choice, moments, checkpoint)

    def _write(
        self,
        name: str,
        found: Fit,
        layer: int,
        variance: float,
        role: str = "",
        choice: Choice | None = None,
    ) -> None:
        module = self.target.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        module.weight.copy_(found.weight)
        if isinstance(module.bias, Tensor):
            module.bias.copy_(found.bias)
        self._note(name, found, layer, variance, role, choice)

    def _note(
        self,
        name: str,
        found: Fit,
        layer: int,
        variance: float,
        role: str = "",
        choice: Choice | None = None,
    ) -> None:
        """Keep what was fitted; raises SlimfuseError for weights that aren't finite."""
        if not bool(found.weight.isfinite().all() and found.bias.isfinite().all()):
            raise SlimfuseError(
                f"the least squares of {name} have no finite answer",
                hint="give more calibration samples; check the parents' activations for nan",
            )
        left_out, kept = (
            None if error is None else share_of(error, variance)
            for error in (found.left_out, found.kept)
        )
        part = name.rsplit(".", 1)[-1]
        error = share_of(found.missed, variance)
        sources = () if choice is None else choice.sources
        saliency = None if choice is None else choice.saliency
        self.parts.append(
            Part(layer, part, error, found.strength, left_out, kept, sources, role, saliency)
        )
