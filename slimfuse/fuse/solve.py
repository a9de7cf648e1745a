"""Closed forms: ridge about a prior, least-squares decoders, greedy choice of units."""

from __future__ import annotations

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-9


def ridge(cross: Tensor, gram: Tensor, prior: Tensor, strength: float) -> Tensor:
    """Return argmin E|goal - W φ|² + λ|W - prior|²_F, W (out, in).

    cross: E[goal φᵀ] (out, in); gram: E[φ φᵀ] (in, in); λ = strength · mean diagonal of gram.
    W = (cross + λ prior)(gram + λ I)⁻¹ (fusion.md §5).
    """
    damp = strength * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    goal = cross + damp * prior
    factor, failed = torch.linalg.cholesky_ex(gram + damp * eye)
    if int(failed):  # a ridge below the rounding of gram leaves it singular
        inverse: Tensor = torch.linalg.pinv(gram + damp * eye, hermitian=True)
        return goal @ inverse
    solution: Tensor = torch.cholesky_solve(goal.T, factor)
    return solution.T


def decoder(cov: Tensor, push: Tensor) -> Tensor:
    """Return D = C A (Aᵀ C A)⁺ (n, m): the best linear reading of x from Aᵀ x (fusion.md words).

    cov: covariance C (n, n) of x; push: A (n, m).
    """
    few = push.T.to_sparse() if int(push.count_nonzero()) <= len(push) else push.T
    seen = (few @ cov).T  # most pushes pick or group units
    inverse: Tensor = torch.linalg.pinv(few @ seen, rtol=RANK_TOLERANCE, hermitian=True)
    return seen @ inverse


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a positive semi-definite matrix and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > RANK_TOLERANCE * values.max().clamp_min(1e-30)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(keep, 1 / root.clamp_min(1e-30), 0)
    return (vectors * (root * keep)) @ vectors.T, (vectors * inverse) @ vectors.T


def directed(vectors: Tensor) -> Tensor:
    """Return eigenvectors, the columns (n, k), with signs that rounding doesn't choose.

    Each one's largest entry is positive. A turn that depends on signs would be another one where
    sums are taken in another order.
    """
    places = vectors.abs().argmax(0)
    found: Tensor = vectors * vectors.gather(0, places[None]).sign()
    return found


def reduce_scores(query: Tensor, key: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return maps (n, size) of a head's queries and keys that keep q·k best at rank `size`.

    query, key: second moments (n, n). The best approximation of E(qᵀk)² is the truncated SVD of
    C_q^½ C_k^½ (fusion.md §4). Ranks beyond n are zero.
    """
    q_root, q_inverse = roots(query)
    k_root, k_inverse = roots(key)
    u, s, vh = torch.linalg.svd(q_root @ k_root)
    half = s[:size].sqrt()
    return _pad(q_inverse @ u[:, :size] * half, size), _pad(k_inverse @ vh[:size].T * half, size)


def reduce_values(cov: Tensor, out: Tensor, size: int) -> Tensor:
    """Return the map (n, size) of a head's values that keeps out·v best at rank `size`.

    cov: covariance (n, n) of the attended values; out: output weights (p, n). Truncated SVD of
    W_o C^½ (fusion.md §4).
    """
    root, inverse = roots(cov)
    _, _, vh = torch.linalg.svd(out @ root, full_matrices=True)
    return _pad(inverse @ vh[:size].T, size)


def _pad(matrix: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, size - matrix.shape[1]))
