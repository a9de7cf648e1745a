"""Exact plans: assignment, network simplex (POT), and the same on a sparse set of pairs."""

from __future__ import annotations

import warnings

import ot
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from torch import Tensor

EMD_ITERATIONS = 10_000_000  # POT's default stops early at 4096 x 2048
SPARSE_FROM = 2**19  # pairs; below it the dense solver takes less than a tenth of a second
NEIGHBOURS = 32  # cheapest pairs of every unit that the sparse problem starts with
ROUNDS = 6  # of adding pairs before the dense solver takes over
MOST_ADDED = 0.1  # share of all pairs in one round; beyond it the dense solver is faster
PRICE_TOLERANCE = 1e-12  # of the largest cost; a negative price beyond it is an improvement
DUST = 1e-12  # of the largest entry: rounding of the simplex, where a partial plan moves nothing


def exact(cost: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, bool]:
    """Return the cheapest plan (n, m) between positive masses, and whether it is proven.

    Equal sizes with uniform masses: an assignment; all else: network simplex (Bonneel et al.
    2011), on few pairs with a dual certificate where the problem is large.
    """
    n, m = cost.shape
    if n == m and _is_uniform(mu) and _is_uniform(nu):
        rows, columns = linear_sum_assignment(cost.numpy())
        plan = torch.zeros(n, m, dtype=torch.float64)
        plan[torch.from_numpy(rows), torch.from_numpy(columns)] = 1 / n
        return plan, True
    if n * m >= SPARSE_FROM:
        found = sparse_exact(cost, mu, nu)
        if found is not None:
            return found, True
    return dense_exact(cost, mu, nu)


def dense_exact(cost: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, bool]:
    """Return POT's network simplex plan over all pairs, and whether it ended by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is kept in the second result
        plan, log = ot.emd(mu, nu, cost, numItermax=EMD_ITERATIONS, log=True)
    return plan, log["warning"] is None


def sparse_exact(cost: Tensor, mu: Tensor, nu: Tensor) -> Tensor | None:
    """Return the cheapest plan by solving over few pairs and adding those with negative price.

    Column generation: with the duals (u, v) of the sparse problem, a plan is the cheapest of all
    once C_ij - u_i - v_j ≥ 0 for every pair (linear programming duality), so the answer is exact
    and not a k-nearest approximation. None where that takes too many rounds or pairs.
    """
    n, m = cost.shape
    tolerance = PRICE_TOLERANCE * float(cost.abs().max())
    # sums over a row or column change no plan, but hide which pairs are cheap in it
    centred = cost - cost.mean(1, keepdim=True) - cost.mean(0)
    used = torch.zeros(n, m, dtype=torch.bool)
    used.scatter_(1, centred.topk(min(NEIGHBOURS, m), 1, largest=False).indices, True)
    used.scatter_(0, centred.topk(min(NEIGHBOURS, n), 0, largest=False).indices, True)
    used[_staircase(mu, nu)] = True  # any masses can move along it: never infeasible
    for _ in range(ROUNDS):
        rows, columns = used.nonzero(as_tuple=True)
        pairs = coo_matrix((cost[rows, columns], (rows, columns)), shape=(n, m))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan, log = ot.emd(mu.numpy(), nu.numpy(), pairs, numItermax=EMD_ITERATIONS, log=True)
        if log["warning"] is not None:
            return None
        price = (cost - torch.from_numpy(log["u"])[:, None]).sub_(torch.from_numpy(log["v"]))
        # a used pair is priced as well as the simplex can: only others are missing
        missing = (price < -tolerance).logical_and_(used.logical_not())
        count = int(missing.sum())
        if count == 0:
            return torch.from_numpy(plan.toarray())
        if count > MOST_ADDED * n * m:
            return None
        used |= missing
    return None


def partial(cost: Tensor, mu: Tensor, nu: Tensor, mass: float) -> tuple[Tensor, bool]:
    """Return the cheapest plan that moves `mass` < 1, and whether it is proven.

    Row sums ≤ mu, column sums ≤ nu. One free dummy unit on either side takes what stays
    (Chapel et al. 2020, arXiv 2002.08276); pairing the dummies costs more than it can save.
    """
    n, m = cost.shape
    shifted = cost - cost.min()  # a constant times a fixed mass changes no plan
    extended = torch.zeros(n + 1, m + 1, dtype=torch.float64)
    extended[:n, :m] = shifted
    extended[n, m] = 2 * float(shifted.max()) or 1.0
    plan, proven = exact(
        extended, torch.cat([mu, (nu.sum() - mass)[None]]), torch.cat([nu, (mu.sum() - mass)[None]])
    )
    plan = plan[:n, :m]
    return plan * (plan > DUST * plan.max()), proven


def _is_uniform(masses: Tensor) -> bool:
    return float(masses.max() - masses.min()) <= 1e-12 * float(masses.max())


def _staircase(mu: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs (n + m - 1) of the north-west corner plan, which couples any masses."""
    a, b = mu.cumsum(0)[:-1], nu.cumsum(0)[:-1]
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cat([a, b]).sort().values])
    return torch.searchsorted(a, steps, right=True), torch.searchsorted(b, steps, right=True)
