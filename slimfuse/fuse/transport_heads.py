"""Heads in the faithful mode: which match, how their units move, and how keys do.

A flattened (head, unit) axis moves by one plan over all its units, whether heads are kept
together or crossed, so that whoever moves weights needn't know which.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from slimfuse.transport import Solver, TransportMap, solve

TINY = torch.finfo(torch.float64).tiny
KEPT = 1e-9  # of the heads' plan's largest entry: what an exact solver means by 0
Pair = tuple[int, int]  # heads of the source and of the target


class Covariances(Protocol):
    """What is known of the sites x and y."""

    def cov(self, a: str, b: str | None = None, /) -> Tensor:
        """Return the covariance of two sites (b defaults to a)."""


def contribution_similarity(
    contexts: Covariances, x_out: Tensor, y_out: Tensor, heads: Pair
) -> Tensor:
    """Return RV coefficients (heads of x, heads of y) of what heads write to their streams.

    RV(u, v) = ‖C_uv‖² / (‖C_uu‖ ‖C_vv‖) for u = O_h a_h and v = P_g b_g (Robert & Escoufier 1976):
    it is 1 where one is a rotated and scaled copy of the other, and the two streams need no common
    basis. ‖O C Pᵀ‖² = tr(Cᵀ OᵀO C PᵀP) keeps everything in the heads' size. contexts: moments of
    the heads' outputs, sites x and y; x_out, y_out: output weights (width, heads·units).
    """
    x_gram, y_gram = _grams(x_out, heads[0]), _grams(y_out, heads[1])
    between = _blocks(contexts.cov("x", "y"), *heads)
    x_own = _own(contexts.cov("x"), heads[0])
    y_own = _own(contexts.cov("y"), heads[1])
    return _rv(
        torch.einsum("hgij,hik,hgkl,glj->hg", between, x_gram, between, y_gram),
        torch.einsum("hij,hik,hkl,hlj->h", x_own, x_gram, x_own, x_gram),
        torch.einsum("hij,hik,hkl,hlj->h", y_own, y_gram, y_own, y_gram),
    )


def weight_similarity(x_rows: Tensor, y_rows: Tensor, heads: Pair) -> Tensor:
    """Return RV coefficients (heads of x, heads of y) of column-aligned rows (heads·units, k).

    They are those of the activations under white inputs, blind to the order of units in a head.
    """
    return _rv(
        _blocks(x_rows @ y_rows.T, *heads).square().sum((2, 3)),
        _own(x_rows @ x_rows.T, heads[0]).square().sum((1, 2)),
        _own(y_rows @ y_rows.T, heads[1]).square().sum((1, 2)),
    )


def match_heads(similarity: Tensor, mu: Tensor, nu: Tensor) -> TransportMap:
    """Return the exact plan between heads; a head's mass is the sum of its units' masses."""
    x_heads, y_heads = similarity.shape
    return solve(1 - similarity, mu.reshape(x_heads, -1).sum(1), nu.reshape(y_heads, -1).sum(1))


def units_in_heads(
    cost: Tensor, mu: Tensor, nu: Tensor, heads: TransportMap, solver: Solver
) -> TransportMap:
    """Return the plan (n, m) of units that stay inside matched heads.

    π[(h, i), (g, j)] = H[h, g] · π_hg[i, j], with π_hg between the units of heads h and g at the
    masses they have inside their heads.
    """
    x_heads, y_heads = heads.plan.shape
    blocks = _blocks(cost, x_heads, y_heads)
    x_inside, y_inside = _inside(mu, x_heads), _inside(nu, y_heads)
    plan = torch.zeros_like(blocks)
    inner = []
    for h, g in (heads.plan > KEPT * heads.plan.max()).nonzero().tolist():
        inner.append(solve(blocks[h, g].contiguous(), x_inside[h], y_inside[g], solver))
        plan[h, g] = heads.plan[h, g] * inner[-1].plan
    paid = float((plan * blocks).sum())
    flat = plan.transpose(1, 2).reshape(cost.shape)
    error = max([heads.marginal_error, *(m.marginal_error for m in inner)])
    converged = heads.converged and all(m.converged for m in inner)
    return TransportMap(flat, flat.sum(1), flat.sum(0), paid, error, converged)


def key_side(tmap: TransportMap, heads: Pair) -> Tensor:
    """Return the matrix (n, m) that moves keys: a mean over heads, a sum inside a head.

    A key's axis writes its head and reads its units (the score sums over them): the entry is
    plan / (ν of the target's head · μ of the source's unit inside its head). `pull` would sum
    over heads, too, and be too large by the number of source heads per target head.
    """
    inside = _inside(tmap.mu, heads[0]).reshape(-1)
    nu = tmap.nu.reshape(heads[1], -1)
    over = nu.sum(1, keepdim=True).expand_as(nu).reshape(-1)
    return tmap.plan / (inside[:, None] * over[None, :]).clamp_min(TINY)


def head_masses(units: Tensor, outputs: Tensor, heads: int) -> Tensor:
    """Return unit masses (heads·units,) rescaled so that each head has the mass of its outputs.

    units, outputs: masses of a head's queries or keys, and of its outputs. Inside a head the
    shares of `units` stay; how much a head weighs is not for its queries to say.
    """
    totals = outputs.reshape(heads, -1).sum(1, keepdim=True)
    return (_inside(units, heads) * totals).reshape(-1)


def _inside(masses: Tensor, heads: int) -> Tensor:
    """Return (heads, units): the units' masses inside their heads, which sum to 1."""
    split = masses.reshape(heads, -1)
    return split / split.sum(1, keepdim=True).clamp_min(TINY)


def _blocks(matrix: Tensor, x_heads: int, y_heads: int) -> Tensor:
    """Return (x_heads, y_heads, units of x, units of y) of a matrix over flattened axes."""
    n, m = matrix.shape
    return matrix.reshape(x_heads, n // x_heads, y_heads, m // y_heads).transpose(1, 2)


def _own(matrix: Tensor, heads: int) -> Tensor:
    """Return the blocks (heads, units, units) on the diagonal."""
    return torch.stack([_blocks(matrix, heads, heads)[h, h] for h in range(heads)])


def _grams(out: Tensor, heads: int) -> Tensor:
    """Return O_hᵀ O_h (heads, units, units) of output weights (width, heads·units)."""
    return torch.stack([o.T @ o for o in out.chunk(heads, dim=1)])


def _rv(between: Tensor, x: Tensor, y: Tensor) -> Tensor:
    scale = (x.clamp_min(0)[:, None] * y.clamp_min(0)[None, :]).sqrt()
    return (between / scale.clamp_min(TINY)).clamp(0, 1)
