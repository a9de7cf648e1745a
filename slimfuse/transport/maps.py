"""A transport plan with what it says about itself, and its two normalised sides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class TransportMap:
    """A coupling `plan` (n, m) of n source with m target units, row sums mu, column sums nu.

    cost: the transport cost Σ plan·cost. marginal_error: the largest absolute distance of a row
    or column sum from the mass that was asked for: the solver's error where the plan is balanced,
    the freedom it took where it is unbalanced or partial (there mu and nu are its own sums).
    converged: whether the solver reached its tolerance.
    """

    plan: Tensor
    mu: Tensor
    nu: Tensor
    cost: float
    marginal_error: float
    converged: bool

    @cached_property
    def push(self) -> Tensor:
        """Plan / nu (n, m): columns sum to 1; writers move by its transpose (fusion.md §1).

        A target unit without mass is a mix of nothing: its column is 0.
        """
        return self.plan / self.nu.clamp_min(TINY)[None, :]

    @cached_property
    def pull(self) -> Tensor:
        """Plan / mu (n, m): rows sum to 1, or to 0 without mass; readers move by it."""
        return self.plan / self.mu.clamp_min(TINY)[:, None]

    @property
    def effective_units(self) -> float:
        """Return the mean perplexity of the columns: source units mixed into a target unit.

        Columns without mass mix nothing and are left out; 0 where no column has mass.
        """
        columns = self.push[:, self.nu > 0]
        entropy = -torch.special.xlogy(columns, columns).sum(0)
        return float(entropy.exp().mean()) if columns.shape[1] else 0.0

    @property
    def entropy(self) -> float:
        """Return the plan's entropy relative to that of the independent coupling, in 0 … 1."""
        most = _entropy(self.mu) + _entropy(self.nu)
        return _entropy(self.plan) / most if most > 0 else 0.0


def _entropy(masses: Tensor) -> float:
    """Return the entropy of masses in proportion (partial plans move less than 1)."""
    shares = masses / masses.sum().clamp_min(TINY)
    return float(-torch.special.xlogy(shares, shares).sum())


def from_plan(plan: Tensor, cost: float = 0.0, converged: bool = True) -> TransportMap:
    """Return the map of a plan whose own sums are its marginals."""
    return TransportMap(plan, plan.sum(1), plan.sum(0), cost, 0.0, converged)


def from_assignment(target_of: Tensor, targets: int) -> TransportMap:
    """Return the hard map that sends source i to target_of[i], every source with equal mass."""
    plan = torch.zeros(len(target_of), targets, dtype=torch.float64)
    plan[torch.arange(len(target_of)), target_of] = 1 / len(target_of)
    return from_plan(plan)
