"""Transport plans: one solver description, one function, any kind of plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from slimfuse.transport import entropic, exact
from slimfuse.transport.entropic import Found
from slimfuse.transport.maps import TransportMap
from slimfuse.transport.masses import uniform
from slimfuse.transport.softness import at_units, softest_units

Kind = Literal["emd", "sinkhorn", "unbalanced", "partial"]


@dataclass(frozen=True)
class Solver:
    """How a plan is found.

    kind: emd (exact), sinkhorn (entropic), unbalanced (entropic, KL penalties instead of fixed
    masses) or partial (a share of the mass moves; exact, or entropic with a softness).
    reg: the entropic regulariser in units of the mean cost. effective_units: the softness
    instead of `reg`, as source units per target unit (`TransportMap.effective_units`).
    marginal_reg: unbalanced only, weight of the KL penalties in units of the mean cost.
    mass: partial only, the share that moves. Raises ValueError for what does not fit together.
    """

    kind: Kind = "emd"
    reg: float | None = None
    effective_units: float | None = None
    marginal_reg: float = 1.0
    mass: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            allowed = ", ".join(get_args(Kind))
            raise ValueError(f"solver kind {self.kind!r} is unknown; known: {allowed}")
        if self.reg is not None and not 0 < self.reg < math.inf:
            raise ValueError(f"reg must be above 0, got {self.reg}; exact plans are kind 'emd'")
        if self.effective_units is not None and not 1 <= self.effective_units < math.inf:
            raise ValueError(f"effective_units must be at least 1, got {self.effective_units}")
        given = (self.reg is not None) + (self.effective_units is not None)
        if given == 2:
            raise ValueError("reg and effective_units both set the softness; give one of them")
        if self.kind == "emd" and given:
            raise ValueError("an exact plan (kind 'emd') has no softness; use kind 'sinkhorn'")
        if self.kind in ("sinkhorn", "unbalanced") and not given:
            raise ValueError(f"kind {self.kind!r} needs a softness: reg or effective_units")
        if not 0 < self.marginal_reg < math.inf:
            raise ValueError(f"marginal_reg must be above 0, got {self.marginal_reg}")
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass is a share above 0 and at most 1, got {self.mass}")


def solve(
    cost: Tensor,
    mu: Tensor | None = None,
    nu: Tensor | None = None,
    solver: Solver = Solver(),
) -> TransportMap:
    """Return the plan between masses mu (n,) and nu (m,) at the least `cost` (n, m), in float64.

    Masses default to uniform, count relative to their sum, and may be 0 for single units.
    Exact: assignment or network simplex (Bonneel et al. 2011). Entropic: Cuturi 2013 (arXiv
    1306.0895), by POT in a stabilised log domain. A plan that missed its tolerance comes back
    with converged=False. Raises ValueError for malformed costs or masses and for a softness that
    no regulariser gives.
    """
    if cost.ndim != 2 or cost.numel() == 0:
        raise ValueError(f"a cost must be a matrix of units by units, got {tuple(cost.shape)}")
    cost = cost.detach().double().cpu()
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("the cost holds NaN or infinite entries")
    mu = uniform(cost.shape[0]) if mu is None else _checked(mu, cost.shape[0], "mu")
    nu = uniform(cost.shape[1]) if nu is None else _checked(nu, cost.shape[1], "nu")
    rows, columns = mu > 0, nu > 0
    if bool(rows.all() and columns.all()):
        found = _found(cost, mu, nu, solver)
        plan = found.plan
    else:  # a unit without mass takes no part; solvers in logarithms could not say so
        found = _found(cost[rows][:, columns].contiguous(), mu[rows], nu[columns], solver)
        plan = torch.zeros_like(cost)
        plan[rows.nonzero(), columns.nonzero().T] = found.plan
    sums = plan.sum(1), plan.sum(0)
    error = max(float((sums[0] - mu).abs().max()), float((sums[1] - nu).abs().max()))
    converged = found.converged and bool(torch.isfinite(plan).all())
    if solver.kind in ("unbalanced", "partial"):
        mu, nu = sums
    else:
        converged = converged and error <= 1e-6
    return TransportMap(plan, mu, nu, float((plan * cost).sum()), error, converged)


def _found(cost: Tensor, mu: Tensor, nu: Tensor, solver: Solver) -> Found:
    """Return the plan of positive masses."""
    unit = float(cost.abs().mean()) or 1.0  # no cost at all: any unit will do
    whole = solver.kind == "partial" and solver.mass == 1  # a partial plan that is none
    kind = (
        ("emd" if solver.reg is None and solver.effective_units is None else "sinkhorn")
        if whole
        else solver.kind
    )

    def soft(reg: float, rough: bool, start: entropic.Potentials | None) -> Found:
        scaled = reg * unit
        if kind == "unbalanced":
            rho = solver.marginal_reg * unit
            return entropic.unbalanced(cost, mu, nu, scaled, rho, rough=rough, start=start)
        if kind == "partial":
            return entropic.partial(cost, mu, nu, scaled, solver.mass, rough=rough)
        return entropic.sinkhorn(cost, mu, nu, scaled, rough=rough, start=start)

    def hard() -> Found:
        if kind == "partial":
            return Found(*exact.partial(cost, mu, nu, solver.mass))
        return Found(*exact.exact(cost, mu, nu))

    if solver.reg is not None:
        return soft(solver.reg, False, None)
    if solver.effective_units is None:
        return hard()
    hardest = None if kind == "unbalanced" else hard()
    return at_units(solver.effective_units, soft, hardest, softest_units(mu))


def _checked(given: Tensor, size: int, name: str) -> Tensor:
    """Return masses in float64 that sum to 1."""
    if given.shape != (size,):
        raise ValueError(f"{name} must hold {size} masses, got shape {tuple(given.shape)}")
    masses = given.detach().double().cpu()
    total = float(masses.sum())
    if not (bool((masses >= 0).all()) and 0 < total < math.inf):
        raise ValueError(f"{name} must hold finite masses of at least 0 with a sum above 0")
    return masses / total
