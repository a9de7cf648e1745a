"""Exact leave-one-sequence-out error of a ridge refit, for all strengths in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

import torch
from torch import Tensor

TIE = 1e-9  # relative difference below which two errors, or two weights, count as equal
ROUNDING = 1e-12  # share of the goals' size below which an error is rounding, whatever it is
UNTOUCHED: Literal["untouched"] = "untouched"
Strength = float | Literal["untouched"]  # inf: the prior's weights with the bias matched
Group = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Scores:
    """Mean weighted squared error |goal - prediction|² of groups that the fit did not see.

    strengths, errors: of each ridge, weakest first; prior: of the prior's weights, with their bias
    fitted where there is one (strength = inf); untouched: of the prior with its own bias, None
    without one; groups, rows: what the errors rest on; rounding: differences of errors that say
    nothing. An error is inf where leaving a group out leaves no fit.
    """

    strengths: tuple[float, ...]
    errors: tuple[float, ...]
    prior: float
    untouched: float | None
    groups: int
    rows: int
    rounding: float = 0.0

    def error(self, choice: Strength) -> float:
        """Return the error of one of the choices."""
        if choice == UNTOUCHED:
            assert self.untouched is not None, "no bias was given with the prior"
            return self.untouched
        return self.prior if choice == inf else self.errors[self.strengths.index(choice)]

    @property
    def best(self) -> Strength:
        """Return the choice of least error; ties go to the one that moves the weights less."""
        choices: list[Strength] = [*self.strengths, inf]
        if self.untouched is not None:
            choices.append(UNTOUCHED)
        least = min(self.error(c) for c in choices)
        if not isfinite(least):  # one group is all there is: nothing says that a refit helps
            return choices[-1]
        most = least * (1 + TIE) + self.rounding
        return next(c for c in reversed(choices) if self.error(c) <= most)


class LeaveOut:
    """Ridge of goals on inputs about a prior, judged on the groups that `update` shows it.

    The fit uses all rows: W = argmin Σ w|goal - W φ - b|² / Σw + λ|W - W₀|², b = ȳ - W φ̄ free,
    λ = strength · mean diagonal of gram (`solve.ridge`). With a group b left out, Σw and λ of the
    penalty unchanged, its residual is exactly e_b = (I - H_bb)⁻¹ r_b in √w scaling,
    H_bb = √w√wᵀ/Σw + Φ (Σw (gram + λI))⁻¹ Φᵀ, Φ = √w (φ - φ̄)
    (block form of the leave-one-out identity, arXiv 2203.07337; diagnostics.md §2).
    One eigendecomposition of gram serves all strengths. Without an intercept, statistics are second
    moments, b = 0, φ isn't centred and H lacks its first part.
    """

    def __init__(
        self,
        cross: Tensor,
        gram: Tensor,
        mean_in: Tensor,
        mean_goal: Tensor,
        total_weight: float,
        prior: Tensor,
        prior_bias: Tensor | None,
        strengths: Sequence[float],
        *,
        intercept: bool = True,
    ) -> None:
        """Take the weighted statistics of all rows.

        cross: Cov[goal, input] (k, d); gram: Cov[input, input] (d, d); mean_in: (d,); mean_goal:
        (k,); total_weight: Σw; prior: W₀ (k, d); prior_bias: b₀ (k,), or None to leave
        "untouched" out of the choices; strengths: relative, all above 0. Without an intercept
        cross and gram are second moments, both means zeros, and there is no prior_bias.
        """
        assert all(0 < s < inf for s in strengths), "a ridge needs a strength above 0"
        assert intercept or (prior_bias is None and not mean_in.any() and not mean_goal.any())
        self._intercept = intercept
        self.strengths = tuple(sorted(strengths))
        self._mean_in, self._mean_goal = mean_in.double(), mean_goal.double()
        self._prior, self._total = prior.double(), float(total_weight)
        self._bias = None if prior_bias is None else prior_bias.double()
        gram = gram.double()
        values, self._basis = torch.linalg.eigh((gram + gram.T) / 2)
        unit = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        self._inverses = [1 / (values.clamp_min(0) + s * unit) for s in self.strengths]
        self._step = (cross.double() - self._prior @ gram) @ self._basis
        self._sums = [0.0] * len(self.strengths)
        self._prior_sum = self._untouched_sum = self._weight = self._goal_sum = 0.0
        self._groups = self._rows = 0

    def solution(self, choice: Strength) -> tuple[Tensor, Tensor]:
        """Return the weight (k, d) and bias (k,) that a choice stands for, fitted to all rows."""
        if choice == UNTOUCHED:
            assert self._bias is not None, "no bias was given with the prior"
            return self._prior, self._bias
        weight = self._prior
        if choice != inf:
            inverse = self._inverses[self.strengths.index(choice)]
            weight = weight + (self._step * inverse) @ self._basis.T
        return weight, self._mean_goal - weight @ self._mean_in

    def update(self, inputs: Tensor, goals: Tensor, weights: Tensor | None = None) -> None:
        """Judge one group: inputs (t, d), goals (t, k), weights (t,), ones by default.

        All rows of a group must be among the rows of the statistics, with the same weights.
        Cost: one t x t solve and t·d·k multiply-adds for each strength.
        """
        w = torch.ones(len(inputs)) if weights is None else weights
        seen = w > 0
        root = w[seen].double().sqrt()[:, None]
        inputs, goals = inputs[seen].double(), goals[seen].double()
        centred = root * (inputs - self._mean_in)
        rotated = centred @ self._basis
        residual = root * (goals - self._mean_goal) - centred @ self._prior.T
        share = root / self._total**0.5 * self._intercept
        mean_part = share @ share.T
        if float(share.square().sum()) > 1 - TIE:  # nothing is left to fit a bias from
            mean_part = torch.eye(len(root), dtype=root.dtype)
        for i, inverse in enumerate(self._inverses):
            shrunk = rotated * inverse
            hat = mean_part + shrunk @ rotated.T / self._total
            self._sums[i] += _left_out(hat, residual - shrunk @ self._step.T)
        self._prior_sum += _left_out(mean_part, residual)
        if self._bias is not None:
            error = root * (goals - inputs @ self._prior.T - self._bias)
            self._untouched_sum += float(error.square().sum())
        self._goal_sum += float((root * goals).square().sum())
        self._weight += float(root.square().sum())
        self._groups += 1
        self._rows += len(root)

    def scores(self, reduce: Callable[[Tensor], Tensor] = lambda own: own) -> Scores:
        """Return the errors over the groups seen so far.

        reduce: sums a tensor over processes that have seen others.
        """
        own = [*self._sums, self._prior_sum, self._untouched_sum, self._weight, self._goal_sum,
               self._groups, self._rows]  # fmt: skip
        (
            *self._sums,
            self._prior_sum,
            self._untouched_sum,
            self._weight,
            self._goal_sum,
            groups,
            rows,
        ) = reduce(torch.tensor(own, dtype=torch.float64)).tolist()
        self._groups, self._rows = int(groups), int(rows)
        assert self._weight > 0, "no group was seen"
        return Scores(
            strengths=self.strengths,
            errors=tuple(s / self._weight for s in self._sums),
            prior=self._prior_sum / self._weight,
            untouched=None if self._bias is None else self._untouched_sum / self._weight,
            groups=self._groups,
            rows=self._rows,
            rounding=ROUNDING**2 * self._goal_sum / self._weight,
        )


def _left_out(hat: Tensor, residual: Tensor) -> float:
    """Return |(I - H)⁻¹ r|², inf where I - H isn't positive definite: nothing else was fitted."""
    eye = torch.eye(len(hat), dtype=hat.dtype)
    factor, failed = torch.linalg.cholesky_ex(eye - hat)
    if int(failed):
        return inf
    solved: Tensor = torch.cholesky_solve(residual, factor)
    return float(solved.square().sum())
