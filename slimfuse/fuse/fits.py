"""One layer's least squares: which rows it sees, how hard it holds on to its prior."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimfuse.fuse.leave_out import LeaveOut
from slimfuse.fuse.solve import ridge
from slimfuse.moments import Moments
from slimfuse.saliency.parallel import Processes

Weighing = Literal["stream", "reading", "even"]
Ridge = float | None
"""Strength relative to the mean diagonal of the inputs' covariance; None: by leaving out."""

STRENGTHS = tuple(10.0**k for k in range(-6, 3))
TINY = 1e-30
WORK = 1.2e11  # multiply-adds of one covariance, a second or so of one core …
ROWS = 3  # … but never fewer rows than this many times its width
Groups = Iterable[tuple[Tensor, Tensor, Tensor]]
ONE = Processes()
"""The processes where there is one."""


@dataclass(frozen=True)
class Statistics:
    """Weighted statistics of goals (k) and inputs (d) of one layer.

    cross: Cov[goal, input] (k, d); gram: Cov[input] (d, d); mean_in (d,); mean_goal (k,);
    variance: E|goal - mean|²; weight: the rows' total weight. For a layer without a bias all are
    moments about zero and both means are zeros.
    """

    cross: Tensor
    gram: Tensor
    mean_in: Tensor
    mean_goal: Tensor
    variance: float
    weight: float
    intercept: bool = True


def spread(moments: Moments, a: str, b: str | None = None, *, intercept: bool = True) -> Tensor:
    """Return what a fit takes of two sites: their covariance, second moment without intercept."""
    return moments.cov(a, b) if intercept else moments.second(a, b)


def centre(moments: Moments, site: str, *, intercept: bool = True) -> Tensor:
    """Return what the intercept takes up of a site: its mean, zeros without one."""
    mean = moments.mean(site)
    return mean if intercept else torch.zeros_like(mean)


def statistics(moments: Moments, goal: str, inputs: str, *, intercept: bool = True) -> Statistics:
    """Return a fit's statistics from moments of its goals and inputs."""
    return Statistics(
        spread(moments, goal, inputs, intercept=intercept),
        spread(moments, inputs, intercept=intercept),
        centre(moments, inputs, intercept=intercept),
        centre(moments, goal, intercept=intercept),
        float(spread(moments, goal, intercept=intercept).trace()),
        moments.weight,
        intercept,
    )


@dataclass(frozen=True)
class Fit:
    """A fitted layer. missed: its goal's variance left over; strength: of the ridge, inf for the
    prior with a fitted bias, "untouched" for the prior as it was; left_out, kept: mean squared
    error on sequences left out, of this fit and of the prior, None where none were left out.
    """

    weight: Tensor
    bias: Tensor
    missed: float
    strength: float | str
    left_out: float | None = None
    kept: float | None = None


def fit(
    stats: Statistics,
    prior: Tensor,
    strength: Ridge,
    groups: Groups,
    bias: Tensor | None = None,
    ranks: Processes = ONE,
) -> Fit:
    """Return the ridge about `prior` (k, d), with a free bias if `stats` has an intercept.

    strength: None tries `STRENGTHS`, the prior with a fitted bias and, where the prior has a
    `bias` (k,), the prior untouched, and takes what predicts left-out groups best. groups:
    (inputs (t, d), goals (t, k), weights (t,)) of one sequence each, among the rows of `stats`.
    ranks: processes that share the groups; `stats` are of all rows.
    """
    if strength is not None:
        weight = ridge(stats.cross, stats.gram, prior, strength)
        return _done(stats, weight, stats.mean_goal - weight @ stats.mean_in, strength)
    judge = LeaveOut(
        stats.cross, stats.gram, stats.mean_in, stats.mean_goal, stats.weight, prior, bias,
        STRENGTHS, intercept=stats.intercept,
    )  # fmt: skip
    for inputs, goals, weights in groups:
        judge.update(inputs, goals, weights)
    scores = judge.scores(ranks.sum)
    weight, offset = judge.solution(scores.best)
    kept = scores.prior if scores.untouched is None else scores.untouched
    return _done(stats, weight, offset, scores.best, scores.error(scores.best), kept)


def _done(
    stats: Statistics,
    weight: Tensor,
    bias: Tensor,
    strength: float | str,
    left_out: float | None = None,
    kept: float | None = None,
) -> Fit:
    missed = (
        stats.variance - 2 * (weight * stats.cross).sum() + (weight @ stats.gram * weight).sum()
    )
    gap = stats.mean_goal - weight @ stats.mean_in - bias
    return Fit(weight, bias, float(missed + gap.square().sum()), strength, left_out, kept)


class Draw:
    """Which rows of a batch enter a statistic, and with what weight.

    Rows of a stream count by their importance, under RMSNorm of errors in proportion to the
    token's own stream: else the few tokens with massive activations (arXiv 2402.17762) would rule
    every fit. Rows of what is read have one scale; an even weighing is of all real tokens.
    All rows, unless the covariance would cost more than `WORK`: then a seeded
    draw, in which a row is the likelier the more important it is and the lighter the likelier it
    was, so that the expected sums are the same. ranks: processes that share the batches in turn:
    each counts its own, and a row is drawn by its batch's number among all.
    """

    def __init__(self, importance: Tensor, rows: int, ranks: Processes = ONE) -> None:
        """Take importance (checkpoints, tokens), mean 1 at each, and the rows of a checkpoint."""
        self.importance, self.rows, self.ranks = importance, rows, ranks
        self._real: list[Tensor] = []
        self._energies: list[list[Tensor]] = []  # of every batch, at each checkpoint so far
        self._units: list[Tensor] = []  # at each checkpoint: the mean of 1/|x|² in the first batch

    def number(self, batch: int) -> int:
        """Return a batch's number among those of all processes."""
        return self.ranks.index + batch * self.ranks.of

    def see(self, samples: int, mask: Tensor | None) -> None:
        """Take note of the next batch; mask: its real tokens (samples, tokens), None for all."""
        shape = (samples, self.importance.shape[1])
        self._real.append(torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu())
        self._energies.append([])

    def tell(self, batch: int, energy: Tensor) -> None:
        """Take note of |x|² (samples, tokens) of a batch at its next checkpoint (RMSNorm only)."""
        self._energies[batch].append(energy.double().cpu())
        if batch == 0:
            unit = torch.zeros((), dtype=torch.float64)
            if self.number(batch) == 0:
                unit = (1 / self._energies[0][-1][self._real[0]].clamp_min(TINY)).mean()
            self._units.append(self.ranks.sum(unit))

    def weights(self, checkpoint: int, batch: int, kind: Weighing = "stream") -> Tensor:
        """Return the weight (r,) of every row of a batch, 0 where it only pads."""
        real = self._real[batch]
        if kind == "even":
            return real.flatten().double()
        weights = (self.importance[checkpoint] * real).flatten()
        if kind == "stream" and self._energies[0]:
            energy = self._energies[batch][checkpoint].flatten().clamp_min(TINY)
            weights = weights / (energy * self._units[checkpoint])
        return weights

    def __call__(
        self, checkpoint: int, batch: int, width: int, kind: Weighing = "stream"
    ) -> tuple[Tensor, Tensor]:
        """Return places (r,) and weights (r,) for a covariance of this width."""
        weights = self.weights(checkpoint, batch, kind)
        share = max(ROWS * width, WORK / width**2) / self.rows
        if share >= 1:
            places = weights.nonzero()[:, 0]
            return places, weights[places]
        likely = (share * weights).clamp_max(1.0)
        generator = torch.Generator().manual_seed(7_919 * checkpoint + self.number(batch))
        drawn = torch.rand(len(weights), generator=generator) < likely
        places = drawn.nonzero()[:, 0]
        return places, weights[places] / likely[places]


def sequences(
    places: Tensor, tokens: int, inputs: Tensor, goals: Tensor, weights: Tensor
) -> Groups:
    """Yield inputs, goals and weights of each sequence; places: of the rows, tokens: a sequence."""
    _, counts = torch.unique_consecutive(places // tokens, return_counts=True)
    sizes = counts.tolist()
    parts = zip(inputs.split(sizes), goals.split(sizes), weights.split(sizes), strict=True)
    yield from parts
