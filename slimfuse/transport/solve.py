"""Transport plans by POT: exact (network simplex) and entropic (log domain)."""

from __future__ import annotations

import warnings

import ot
import torch
from torch import Tensor

from slimfuse.transport.maps import TransportMap

EMD_ITERATIONS = 10_000_000  # POT's default stops early at 4096 x 2048
SINKHORN_ITERATIONS = 10_000
TOLERANCE = 1e-9


def uniform(size: int) -> Tensor:
    """Return equal masses (size,) that sum to 1, in float64."""
    return torch.full((size,), 1 / size, dtype=torch.float64)


def solve(
    cost: Tensor, mu: Tensor | None = None, nu: Tensor | None = None, *, reg: float | None = None
) -> TransportMap:
    """Return the plan between masses mu (n,) and nu (m,) at the least `cost` (n, m).

    reg: None for the exact plan (Bonneel et al. 2011, network simplex), else the entropic one
    (Cuturi 2013, arXiv 1306.0895) with this regulariser in units of the mean cost. Masses default
    to uniform. A plan that missed its tolerance comes back with converged=False.
    """
    cost = cost.double()
    mu = uniform(cost.shape[0]) if mu is None else mu.double()
    nu = uniform(cost.shape[1]) if nu is None else nu.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is kept in `converged`
        if reg is None:
            plan, log = ot.emd(mu, nu, cost, numItermax=EMD_ITERATIONS, log=True)
            converged = log["warning"] is None
        else:
            plan = ot.sinkhorn(
                mu, nu, cost, reg * float(cost.mean()), method="sinkhorn_log",
                numItermax=SINKHORN_ITERATIONS, stopThr=TOLERANCE,
            )  # fmt: skip
            converged = True
    error = max(float((plan.sum(1) - mu).abs().max()), float((plan.sum(0) - nu).abs().max()))
    converged = converged and error <= 1e-6 and bool(torch.isfinite(plan).all())
    return TransportMap(plan, mu, nu, float((plan * cost).sum()), error, converged)
