"""Entropic plans: balanced and partial by POT, unbalanced (and warm starts) by our own sweeps."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import ot
import torch
from torch import Tensor

ITERATIONS = 10_000
TOLERANCE = 1e-9  # norm of the marginal error, or the largest change of a potential over reg
ROUGH_ITERATIONS = 1_000
ROUGH_TOLERANCE = 1e-6  # moves effective units far less than they are searched to
LOOSE = 1e-4  # tolerance on the way down to a small regulariser
STEP = 4.0  # factor between regularisers on the way down
ABSORB = 1e50  # scalings beyond this are moved into the potentials (log-domain stabilisation)

Potentials = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Found:
    """A plan (n, m), whether the solver reached its tolerance, and potentials to start from."""

    plan: Tensor
    converged: bool
    potentials: Potentials | None = None


def sinkhorn(
    cost: Tensor,
    mu: Tensor,
    nu: Tensor,
    reg: float,
    *,
    rough: bool = False,
    start: Potentials | None = None,
) -> Found:
    """Return argmin Σ P·C + reg KL(P | μ νᵀ) with marginals mu (n,) and nu (m,), all positive.

    reg: in units of `cost`. The potentials come down to `reg` in steps by our own sweeps; POT's
    log-stabilised scaling (Schmitzer 2019, arXiv 1610.06519; a tenth of the time of a full
    log-domain iteration) solves from there, and POT's log-domain Sinkhorn should a kernel
    underflow all the same. A rough plan is the sweeps' alone.
    """
    f, g = start or _steps_down(cost, mu, nu, reg, math.inf)
    if rough:
        (f, g), converged = _sweeps(cost, mu, nu, reg, math.inf, *_effort(rough), (f, g))
        return Found(_gibbs(cost, mu, nu, reg, f, g), converged, (f, g))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is kept in `converged`
        # POT's potentials hold the masses too: its plan is exp((α + β - C) / reg)
        plan, log = ot.bregman.sinkhorn_stabilized(
            mu, nu, cost, reg, numItermax=ITERATIONS, tau=ABSORB, stopThr=TOLERANCE,
            warmstart=(f + reg * mu.log(), g + reg * nu.log()), log=True,
        )  # fmt: skip
        if not bool(torch.isfinite(plan).all()):
            plan, log = ot.bregman.sinkhorn_log(
                mu, nu, cost, reg, numItermax=ITERATIONS, stopThr=TOLERANCE, log=True
            )
    return Found(plan, float(log["err"][-1]) <= TOLERANCE)


def unbalanced(
    cost: Tensor,
    mu: Tensor,
    nu: Tensor,
    reg: float,
    marginal_reg: float,
    *,
    rough: bool = False,
    start: Potentials | None = None,
) -> Found:
    """Return argmin Σ P·C + reg KL(P | μ νᵀ) + ρ KL(P1 | μ) + ρ KL(Pᵀ1 | ν), ρ = marginal_reg.

    reg, marginal_reg: in units of `cost`. Scaling with log-domain stabilisation (Chizat et al.
    2018, arXiv 1607.05816), and after every sweep the best constant shift between the potentials,
    without which a large ρ converges slowly (Séjourné et al. 2022, arXiv 2201.00730). Our own
    code: POT's stabilised solver adds 1e-16 to sums that are themselves smaller at a small reg.
    """
    start = start or _steps_down(cost, mu, nu, reg, marginal_reg)
    (f, g), converged = _sweeps(cost, mu, nu, reg, marginal_reg, *_effort(rough), start)
    return Found(_gibbs(cost, mu, nu, reg, f, g), converged, (f, g))


def partial(
    cost: Tensor, mu: Tensor, nu: Tensor, reg: float, mass: float, *, rough: bool = False
) -> Found:
    """Return argmin Σ P·C + reg Σ P log P with row sums ≤ mu, column sums ≤ nu, ΣP = mass.

    Dykstra's projections in the log domain by POT (Benamou et al. 2015, arXiv 1412.5154,
    prop. 5). They can stand still for a while before they go on, so a plan that breaks a
    constraint by more than 1e-6 has not converged, whatever the last step was.
    """
    tolerance, iterations = _effort(rough)
    moved = torch.tensor(min(mass, float(mu.sum()), float(nu.sum())), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = ot.partial.entropic_partial_wasserstein_logscale(
            mu, nu, cost, reg, m=moved, numItermax=iterations, stopThr=tolerance, log=True
        )
    excess = max(float((plan.sum(1) - mu).max()), float((plan.sum(0) - nu).max()))
    return Found(plan, float(log["err"][-1]) <= tolerance and excess <= 1e-6)


def _effort(rough: bool) -> tuple[float, int]:
    """Return tolerance and iterations; rough is for plans that only guide a search."""
    return (ROUGH_TOLERANCE, ROUGH_ITERATIONS) if rough else (TOLERANCE, ITERATIONS)


def _sweeps(
    cost: Tensor,
    mu: Tensor,
    nu: Tensor,
    reg: float,
    rho: float,
    tolerance: float,
    iterations: int,
    start: Potentials,
) -> tuple[Potentials, bool]:
    """Return the potentials (f, g) of P = μ νᵀ exp((f + g - C) / reg), and if they settled.

    rho: inf for fixed marginals. The kernel about the absorbed potentials (f0, g0) stays fixed
    while sweeps move f and g.
    """
    (f, g), damp = start, 1 / (1 + reg / rho)
    f0, g0, kernel = f, g, _gibbs(cost, mu, nu, reg, f, g)
    limit = reg * 115  # log of ABSORB
    for _ in range(iterations):
        before = f, g
        if max(float((f - f0).abs().max()), float((g - g0).abs().max())) > limit:
            f0, g0, kernel = f, g, _gibbs(cost, mu, nu, reg, f, g)
        rows = kernel @ ((g - g0) / reg).exp()
        if float((rows / mu).min()) > 1 / ABSORB:
            f = damp * (f0 + reg * (mu.log() - rows.log()))
        else:  # the kernel has underflown in a whole row: one step in the log domain
            f = -damp * reg * torch.logsumexp(nu.log() + (g - cost) / reg, 1)
        columns = kernel.T @ ((f - f0) / reg).exp()
        if float((columns / nu).min()) > 1 / ABSORB:
            g = damp * (g0 + reg * (nu.log() - columns.log()))
        else:
            g = -damp * reg * torch.logsumexp(mu.log()[:, None] + (f[:, None] - cost) / reg, 0)
        if rho < math.inf:
            shift = (rho / 2) * (
                torch.logsumexp(mu.log() - f / rho, 0) - torch.logsumexp(nu.log() - g / rho, 0)
            )
            f, g = f + shift, g - shift
        change = max(float((f - before[0]).abs().max()), float((g - before[1]).abs().max())) / reg
        if change <= tolerance:
            return (f, g), True
    return (f, g), False


def _gibbs(cost: Tensor, mu: Tensor, nu: Tensor, reg: float, f: Tensor, g: Tensor) -> Tensor:
    """Return μ νᵀ exp((f + g - C) / reg) (n, m)."""
    exponent = (f[:, None] + g - cost).div_(reg)
    return exponent.exp_().mul_(mu[:, None]).mul_(nu)


def _steps_down(cost: Tensor, mu: Tensor, nu: Tensor, reg: float, rho: float) -> Potentials:
    """Return rough potentials at falling regularisers above `reg`, from the spread of the cost."""
    found, value = (torch.zeros_like(mu), torch.zeros_like(nu)), float(cost.max() - cost.min())
    while value > reg * STEP:
        found, _ = _sweeps(cost, mu, nu, value, rho, LOOSE, 100, found)
        value /= STEP
    return found
