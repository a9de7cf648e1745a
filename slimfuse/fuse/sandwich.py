"""Branches whose output goes through a norm of its own: x + γ u / ρ(u), u = W h (Gemma 3).

ρ, the root mean square of a token's u, is what such a branch isn't linear in. With units h / ρ it
is: γ W (h / ρ). So the parents' units count as divided by their own ρ, and the target's as divided
by s, the mean of what its parents divide that token by. W'' fits what is missing in the stream to
h' / s, as of any other branch. The target writes γ' u' / ρ(u') with u' = diag(1/γ') W'' h': in
the wanted direction, whatever γ' is, and of the wanted size where
    ρ(u')² = Σ_i (1/γ'_i²) v_i² / m = s² - ε,   v = W'' h',
which is linear in 1/γ'². Its least squares hold on to the parents' own gains. Where the target's
channels are chosen ones of a parent, nothing is lost: γ' = γ. Then each channel's γ' is the
least-squares one of what is missing on u' / ρ(u').
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimfuse.fuse import walk
from slimfuse.fuse.fits import Statistics, fit
from slimfuse.fuse.stream import StreamMap, pivots
from slimfuse.fuse.union import Member
from slimfuse.fuse.walk import rows

if TYPE_CHECKING:
    from slimfuse.fuse.builder import Builder

LEAST_GAIN = 1e-3  # of the gains' root mean square: a channel below carries nothing
LOSSLESS = 1e-9  # of the stream's energy
SPAN = 10.0  # 1/γ'² stays within this factor of what the parents' gains say


def upright(narrow: StreamMap) -> StreamMap:
    """Return a map that loses nothing of the stream turned to the source's channels.

    Gains of norms behind branches hold channels in place, so that a map is exact only where it
    chooses channels or averages alike ones. The turn is the polar factor of the map at the channels
    that explain it best. A map that loses something stays: none of its turns is exact, and the
    principal directions themselves do better (KL .77 against .81 and .81 against .86 at half the
    width of two Gemmas trained for 110 s).
    """
    encode = narrow.encode
    if narrow.kept < 1 - LOSSLESS:
        return narrow
    picks = encode[:, torch.tensor(pivots(encode.T @ encode, len(encode)))]
    u, _, vh = torch.linalg.svd(picks)
    turn = (u @ vh).T
    return replace(narrow, encode=turn @ encode, decode=narrow.decode @ turn.T)


class Sandwich:
    """What the branches of a block's part (o or down) are divided by, and the target's gains."""

    def __init__(self, builder: Builder, index: int, part: str, members: Sequence[Member]) -> None:
        self.builder, self.part, self.members = builder, part, members
        self.block = builder.layout.blocks[index]
        run = builder.run
        sums = torch.zeros(len(members), dtype=torch.float64)
        for b in range(len(run.sizes)):
            real = run.draw.weights(0, b, "even") > 0
            sums += torch.stack([rows(run.divisor(k, b))[real].sum() for k in range(len(members))])
        sums = builder.ranks.sum(sums)
        self._means = sums / sums.sum().clamp_min(1e-30) * len(members)  # of each, in their mean's

    def scale(self, batch: int) -> Tensor:
        """Return s (batch, tokens, 1)."""
        parts = [
            self.builder.run.divisor(k, batch) / float(mean) for k, mean in enumerate(self._means)
        ]
        return torch.stack(parts).mean(0)

    def readbacks(self, read: Tensor, push: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return how parents' divided units are read from the target's (Σ n, m), `read` likewise.

        read: from the parents' divided units as `push` (Σ n, m) gives them to the target.
        """
        own = self._means.repeat_interleave(torch.tensor(sizes))
        mean = (push.T @ own) / push.sum(0).clamp_min(1e-30)
        return read / mean

    def settle(self, weight: Tensor, checkpoint: int) -> Tensor:
        """Set the norm's gain and return the layer's weight, diag(1/γ') W''; weight: W'' (m, n)."""
        builder, run = self.builder, self.builder.run
        norm = builder.target.get_submodule(self.block.post(self.part))
        assert isinstance(norm.weight, Tensor) and isinstance(norm.eps, float)
        eps = norm.eps
        prior = self._wanted_gain()
        width = len(prior)
        scales = [self.scale(b) for b in range(len(run.sizes))]

        def written(batch: int, places: Tensor) -> Tensor:
            return rows(run.cache.get("u", batch), places) @ weight.T

        def squares(batch: int, places: Tensor) -> Tensor:
            divided = written(batch, places) / rows(scales[batch], places)
            return (divided / prior).square() / width

        def ones(batch: int, places: Tensor) -> Tensor:
            return 1 - eps / rows(scales[batch], places).square()

        moments = builder._moments(f=width, one=1)
        for b in range(len(run.sizes)):
            places, weights = builder.draw(checkpoint, b, width)
            moments.update(weights, f=squares(b, places), one=ones(b, places))
        gram, cross = moments.second("f"), moments.second("one", "f")
        none = torch.zeros(width, dtype=torch.float64)
        whole = float(moments.second("one"))
        level = cross.sum() / gram.sum().clamp_min(1e-30)
        stats = Statistics(cross, gram, none, none[:1], whole, moments.weight, intercept=False)
        groups = run.judges(checkpoint, width, squares, ones)
        prior_ratio = level * torch.ones_like(cross)
        found = fit(stats, prior_ratio, builder.settings.ridge, groups, ranks=builder.ranks)
        ratio = found.weight[0].clamp(level / SPAN, level * SPAN)
        gain = prior / ratio.clamp_min(1e-30).sqrt()
        weight = weight / gain[:, None]
        norm.weight.fill_(1)
        told = goal = none
        for b in range(len(run.sizes)):
            places, weights = builder.draw(checkpoint, b, width)
            normed = rows(self._written(weight, b), places)
            told = told + weights @ normed.square()
            goal = goal + weights @ (normed * builder._missing(b, places))
        told, goal = builder.ranks.sum(told), builder.ranks.sum(goal)
        norm.weight.copy_(torch.where(told > 0, goal / told.clamp_min(1e-30), gain))
        return weight

    def _written(self, weight: Tensor, batch: int) -> Tensor:
        units = self.builder.run.cache.get("u", batch)
        out = (units.double() @ weight.T).to(units.dtype)
        return walk.apply(self.builder.target, self.block.post(self.part), out)

    def _wanted_gain(self) -> Tensor:
        """Return the root mean square (m,) of the parents' gains in each of the target's channels.

        Of channels that are chosen, the chosen ones' own.
        """
        squares = []
        for member in self.members:
            mix = self.builder.mixes[member.parent].square()
            gain = self.builder.union.post_gain(member, self.part).square()
            squares.append(mix @ gain / mix.sum(1).clamp_min(1e-30))
        found = torch.stack(squares).mean(0).sqrt()
        return found.clamp_min(LEAST_GAIN * float(found.square().mean().sqrt()))
