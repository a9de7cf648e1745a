"""Costs between units from streamed moments: O(n·m) memory however many samples."""

from __future__ import annotations

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
