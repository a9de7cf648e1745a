"""Optimal Brain Surgeon on a block Fisher: what removing weights costs, and how the rest adapts.

All minimise the quadratic model ½ δᵀFδ (+ ḡᵀδ, WoodTaylor) under δ_Q = −w_Q. Weights and masks are
(n, B) like the blocks. Source: Hassibi and Stork 1993; WoodFisher (arXiv 2004.14340), section 4;
oBERT (arXiv 2203.07259), equations 6 to 9.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from slimfuse.saliency.inverse import BlockInverse, runs

Update = Literal["joint", "single", "none"]
MOST_SETS = 100  # patterns of a group that are all tried


def statistic(inverse: BlockInverse, weights: Tensor) -> Tensor:
    """Return ρ_q = w_q²/(2 [F⁻¹]_qq) (n, B), the least loss that removing weight q alone costs."""
    return weights.square() / (2 * inverse.diagonal())


def group_statistic(inverse: BlockInverse, weights: Tensor, size: int) -> Tensor:
    """Return ρ_Q = ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q (n, B/size) of each run Q of `size` weights."""
    if size == 1:
        return statistic(inverse, weights)
    return _quadratic(inverse.groups(size), runs(weights, 1, size))


def pattern_statistic(inverse: BlockInverse, weights: Tensor, size: int, removed: Tensor) -> Tensor:
    """Return ρ_Q (n, B/size, p) of removing each of p sets Q inside each run of `size` weights.

    removed: places (p, q) inside a run.
    """
    groups, cut = inverse.groups(size), runs(weights, 1, size)
    costs = [
        _quadratic(groups[..., places, :][..., places], cut[..., places]) for places in removed
    ]
    return torch.stack(costs, dim=-1)


def update(inverse: BlockInverse, weights: Tensor, kept: Tensor, how: Update = "joint") -> Tensor:
    """Return the weights (n, B) after all outside `kept` (n, B) were removed.

    joint: the minimiser w − F⁻¹_{:,Q}([F⁻¹]_QQ)⁻¹w_Q, computed as w_K + (F_KK)⁻¹F_KQ w_Q.
    single: the sum of the updates −(w_q/[F⁻¹]_qq) F⁻¹e_q of each removed weight alone, which the
    published code makes. none: the rest stays as it is.
    """
    if how == "none":
        return weights * kept
    removed = weights * ~kept
    if how == "single":
        change = -inverse.solve(removed / inverse.diagonal())
    else:
        change = inverse.restricted(kept).solve(inverse.times(removed) * kept)
    return (weights + change) * kept


def newton(inverse: BlockInverse, gradient: Tensor) -> Tensor:
    """Return h = F⁻¹ḡ (n, B): −h is the step that a quadratic model takes before any removal.

    WoodTaylor is OBS about w − h: `statistic` and `update` of those weights. Its constant −½ ḡᵀh is
    one for the whole model, however many weights go, so that no ranking needs it.
    """
    return inverse.solve(gradient)


def taylor_statistic(inverse: BlockInverse, weights: Tensor, gradient: Tensor) -> Tensor:
    """Return WoodTaylor's ρ_q = (w_q − h_q)²/(2 [F⁻¹]_qq) − ½ ḡᵀh (n, B).

    ḡᵀh is summed over the blocks given. Source: WoodFisher, appendix on WoodTaylor.
    """
    h = newton(inverse, gradient)
    return statistic(inverse, weights - h) - 0.5 * (gradient * h).sum()


def taylor_update(
    inverse: BlockInverse, weights: Tensor, gradient: Tensor, kept: Tensor, how: Update = "joint"
) -> Tensor:
    """Return WoodTaylor's weights after removal: −h once, and the OBS update of w − h."""
    return update(inverse, weights - newton(inverse, gradient), kept, how)


def increase(inverse: BlockInverse, change: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Return ½ δᵀFδ + ḡᵀδ (n,), what the quadratic model says that a change (n, B) costs."""
    cost = 0.5 * (change * inverse.times(change)).sum(1)
    return cost if gradient is None else cost + (gradient * change).sum(1)


def _quadratic(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return ½ vᵀA⁻¹v over the last axes, A positive definite."""
    solved = torch.cholesky_solve(vectors[..., None], torch.linalg.cholesky(matrices))
    return 0.5 * (vectors * solved[..., 0]).sum(-1)


def keep_of_every(
    inverse: BlockInverse, weights: Tensor, alive: Tensor, size: int, removed: int
) -> Tensor:
    """Return which weights (n, B) stay when `removed` of every `size` go, at the least Σ ρ_Q.

    All sets Q are tried up to 100 of them; beyond that the weights of a group go one after the
    other, each the cheapest given those before. Weights outside `alive` (n, B) count as removed.
    """
    if removed == 0:
        return alive
    groups = runs(alive, 1, size)
    if math.comb(size, removed) > MOST_SETS:
        gone = _greedy(inverse.groups(size), runs(weights, 1, size), groups, removed)
    else:
        sets = torch.tensor(list(combinations(range(size), removed)), device=weights.device)
        masks = torch.zeros(len(sets), size, dtype=torch.bool, device=weights.device)
        masks.scatter_(1, sets, True)
        costs = pattern_statistic(inverse, weights, size, sets)
        keeps_dead = (~groups[..., None, :] & ~masks).any(-1)
        takes_alive = (groups[..., None, :] & masks).any(-1)
        gone = masks[costs.masked_fill(keeps_dead & takes_alive, math.inf).argmin(-1)]
    return (groups & ~gone).flatten(1)


def _greedy(inverse: Tensor, weights: Tensor, alive: Tensor, removed: int) -> Tensor:
    """Return which weights (n, g, size) go, one by one, with OBS downdates of a group's inverse."""
    inverse, weights, gone = inverse.clone(), weights.clone(), torch.zeros_like(alive)
    for _ in range(removed):
        pivots = inverse.diagonal(dim1=-2, dim2=-1)
        costs = weights.square() / (2 * pivots)
        costs = costs.masked_fill(~alive, -1.0).masked_fill(gone, math.inf)
        chosen = costs.argmin(-1, keepdim=True)
        column = inverse.gather(-1, chosen[..., None].expand(*inverse.shape[:-1], 1))[..., 0]
        pivot = column.gather(-1, chosen)
        weights -= column * (weights.gather(-1, chosen) / pivot)
        inverse -= column[..., :, None] * column[..., None, :] / pivot[..., None]
        gone.scatter_(-1, chosen, True)
        # what is removed is never looked at again; 1 keeps its pivot from being nought
        inverse.diagonal(dim1=-2, dim2=-1).masked_fill_(gone, 1.0)
    return gone
