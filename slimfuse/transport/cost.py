"""Costs between units from streamed moments or aligned weights: O(n·m) memory, float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def correlation(cov: Tensor, var_x: Tensor, var_y: Tensor, eps: float = 1e-12) -> Tensor:
    """Return the correlations (n, m) of units x and y; units that never vary get 0."""
    scale = (var_x.clamp_min(0)[:, None] * var_y.clamp_min(0)[None, :]).sqrt()
    return (cov / scale.clamp_min(eps)).clamp(-1, 1) * (scale > eps)


def standardised_cost(cov: Tensor, var_x: Tensor, var_y: Tensor) -> Tensor:
    """Return 2(1 - ρ) (n, m): the mean squared distance of standardised activations.

    cov: (n, m) covariance of x and y; var_x: (n,), var_y: (m,). Source: fusion.md §2.
    """
    return 2 * (1 - correlation(cov, var_x, var_y))


def raw_cost(second_xy: Tensor, second_x: Tensor, second_y: Tensor) -> Tensor:
    """Return E(x - y)² (n, m) from E[xy] (n, m), E[x²] (n,) and E[y²] (m,), clamped at 0."""
    return (second_x[:, None] + second_y[None, :] - 2 * second_xy).clamp_min(0)


def weight_cost(rows_x: Tensor, rows_y: Tensor, *, standardised: bool = False) -> Tensor:
    """Return |w_i - v_j|² (n, m) of weight rows w (n, k) and v (m, k), clamped at 0.

    The columns must already be aligned: both sides read the same k inputs. standardised: divide
    every row by its norm first, which gives 2(1 - cosine); a row of zeros stays zero. Source:
    Singh & Jaggi, arXiv 1910.05653, §4 (weight-based alignment). Raises ValueError where the
    columns differ in number.
    """
    if rows_x.ndim != 2 or rows_y.ndim != 2 or rows_x.shape[1] != rows_y.shape[1]:
        raise ValueError(
            "weight costs need rows over the same aligned columns, got shapes "
            f"{tuple(rows_x.shape)} and {tuple(rows_y.shape)}"
        )
    x, y = rows_x.detach().double().cpu(), rows_y.detach().double().cpu()
    if standardised:
        x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    return raw_cost(x @ y.T, x.square().sum(1), y.square().sum(1))


def combine(costs: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return Σ_k w_k C_k / mean(C_k) (n, m): several costs of the same units on one scale.

    weights: at least 0, ones by default. A cost that is 0 everywhere adds nothing. Raises
    ValueError for no costs, unequal shapes, and weights that are negative, not finite or all 0.
    """
    weights = [1.0] * len(costs) if weights is None else weights
    shapes = [tuple(c.shape) for c in costs]
    if not costs or len(set(shapes)) > 1 or len(weights) != len(costs):
        raise ValueError(
            f"combine needs costs of one shape and a weight for each, got shapes {shapes} "
            f"and {len(weights)} weights"
        )
    if not all(0 <= w < float("inf") for w in weights) or sum(weights) == 0:
        raise ValueError(f"weights of costs must be at least 0 and not all 0, got {list(weights)}")
    total = torch.zeros(shapes[0], dtype=torch.float64)
    for cost, weight in zip(costs, weights, strict=True):
        cost = cost.detach().double().cpu()
        mean = float(cost.mean())
        if mean > 0:
            total += weight / mean * cost
    return total
