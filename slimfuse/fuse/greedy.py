"""Greedy choice of the units that explain what all of them write best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimfuse.fuse.solve import RANK_TOLERANCE, roots

AT_ONCE = 512
"""One unit is taken at a time among so many, and one more for each further as many."""
CANDIDATES = 16  # times as many as are taken at once


def greedy_groups(cov: Tensor, out: Tensor, groups: Sequence[Tensor], keep: int) -> list[int]:
    """Return `keep` groups of units, best first, that together explain out·x best.

    A greedy, output-weighted, block-pivoted Cholesky factorisation: each step takes the group B
    with the largest drop tr(G_B Σ_BB⁻¹ G_Bᵀ) of E|out(x - x̂)|², where x̂ is the linear
    prediction from the groups taken so far, Σ the covariance left over and G = out Σ.
    cov: (n, n); out: (p, n); groups: index tensors into n. Ties go to the first group. Single
    units are chosen by `greedy_units`.
    """
    if all(len(g) == 1 for g in groups):
        flat = torch.cat(list(groups))
        return greedy_units(cov[flat][:, flat], out[:, flat], keep)
    weighted, variance = out @ cov, cov.diagonal()
    tiny = float(RANK_TOLERANCE * variance.clamp_min(0).mean())
    factor = torch.zeros(len(cov), 0, dtype=cov.dtype)  # cov - factor·factorᵀ is what is left
    chosen: list[int] = []

    def block(index: Tensor) -> Tensor:
        return cov[index][:, index] - factor[index] @ factor[index].T

    def drop(index: Tensor) -> Tensor:
        read = weighted[:, index]
        return (read @ _pinv(block(index), tiny) * read).sum()

    for _ in range(keep):
        score = torch.stack([drop(g) for g in groups])
        score[chosen] = -torch.inf
        best = int(score.argmax())
        chosen.append(best)
        index = groups[best]
        columns = cov[:, index] - factor @ factor[index].T
        root = roots(_pinv(block(index), tiny))[0]
        columns = columns @ root
        weighted = weighted - weighted[:, index] @ root @ columns.T
        factor = torch.cat([factor, columns], dim=1)
    return chosen


def greedy_units(cov: Tensor, out: Tensor, keep: int) -> list[int]:
    """Return `keep` units, best first: `greedy_groups` of single units.

    Exact greedy up to 1 023 units. Of more, ⌊n / 512⌋ are taken at once, greedily among the
    few with the largest drop, so that twins of a unit just taken are seen, and the others are
    scored anew after each round: n k² work in products of matrices.
    """
    n = len(cov)
    at_once = max(1, n // AT_ONCE)
    weighted, variance = out @ cov, cov.diagonal().clone()
    tiny = float(RANK_TOLERANCE * variance.clamp_min(0).mean())
    factor = torch.zeros(n, keep, dtype=cov.dtype)
    chosen: list[int] = []
    while len(chosen) < keep:
        taken = len(chosen)
        score = weighted.square().sum(0) / variance.clamp_min(tiny)
        score[chosen] = -torch.inf
        count = min(at_once, keep - taken)
        if count == 1:
            best = [int(score.argmax())]
        else:
            few = score.topk(min(CANDIDATES * count, n - taken)).indices
            left = factor[few, :taken]
            inner = cov[few][:, few] - left @ left.T
            best = [int(few[i]) for i in _pivots(inner, weighted[:, few], count, tiny)]
        index = torch.tensor(best)
        done = factor[:, :taken]
        columns = cov[:, index] - done @ done[index].T
        root = roots(_pinv(columns[index], tiny))[0]
        columns = columns @ root
        weighted -= weighted[:, index] @ root @ columns.T
        variance -= columns.square().sum(1)
        factor[:, taken : taken + count] = columns
        chosen += best
    return chosen


def _pivots(cov: Tensor, weighted: Tensor, count: int, tiny: float) -> list[int]:
    """Return `count` of a few units, best first; weighted: out Σ of these units."""
    cov, weighted = cov.clone(), weighted.clone()
    chosen: list[int] = []
    for _ in range(count):
        variance = cov.diagonal().clamp_min(tiny)
        score = weighted.square().sum(0) / variance
        score[chosen] = -torch.inf
        best = int(score.argmax())
        chosen.append(best)
        column = cov[:, best] / variance[best].sqrt()
        if float(cov[best, best]) > tiny:
            weighted -= torch.outer(weighted[:, best] / variance[best].sqrt(), column)
            cov -= torch.outer(column, column)
    return chosen


def _pinv(matrix: Tensor, tolerance: float) -> Tensor:
    """Return the pseudo-inverse of a covariance; directions below `tolerance` count as nought."""
    inverse: Tensor = torch.linalg.pinv(matrix, atol=tolerance, rtol=0.0, hermitian=True)
    return inverse
