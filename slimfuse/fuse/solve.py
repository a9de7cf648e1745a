"""Closed forms: ridge about a prior, least-squares decoders, greedy choice of units."""

from __future__ import annotations

from collections.abc import Sequence

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
    factor = torch.linalg.cholesky(gram + damp * eye)
    solution: Tensor = torch.cholesky_solve((cross + damp * prior).T, factor)
    return solution.T


def decoder(cov: Tensor, push: Tensor) -> Tensor:
    """Return D = C A (Aᵀ C A)⁺ (n, m): the best linear reading of x from Aᵀ x (fusion.md words).

    cov: covariance C (n, n) of x; push: A (n, m).
    """
    kept = push.T @ cov @ push
    inverse: Tensor = torch.linalg.pinv(kept, rtol=RANK_TOLERANCE, hermitian=True)
    return cov @ push @ inverse


def greedy_groups(cov: Tensor, out: Tensor, groups: Sequence[Tensor], keep: int) -> list[int]:
    """Return `keep` groups of units, best first, that together explain out·x best.

    A greedy, output-weighted, block-pivoted Cholesky factorisation: each step takes the group B
    with the largest drop tr(G_B Σ_BB⁻¹ G_Bᵀ) of E|out(x - x̂)|², where x̂ is the linear
    prediction from the groups taken so far, Σ the covariance left over and G = out Σ.
    cov: (n, n); out: (p, n); groups: index tensors into n. Ties go to the first group.
    """
    weighted, variance = out @ cov, cov.diagonal().clone()
    tiny = float(RANK_TOLERANCE * variance.clamp_min(0).mean())
    factor = torch.zeros(len(cov), 0, dtype=cov.dtype)  # cov - factor·factorᵀ is what is left
    chosen: list[int] = []
    single = all(len(g) == 1 for g in groups)
    flat = torch.cat(list(groups))

    def block(index: Tensor) -> Tensor:
        return cov[index][:, index] - factor[index] @ factor[index].T

    def drop(index: Tensor) -> Tensor:
        read = weighted[:, index]
        return (read @ _pinv(block(index), tiny) * read).sum()

    for _ in range(keep):
        if single:
            score = weighted[:, flat].square().sum(0) / variance[flat].clamp_min(tiny)
        else:
            score = torch.stack([drop(g) for g in groups])
        score[chosen] = -torch.inf
        best = int(score.argmax())
        chosen.append(best)
        index = groups[best]
        columns = cov[:, index] - factor @ factor[index].T
        root = roots(_pinv(block(index), tiny))[0]
        weighted = weighted - weighted[:, index] @ root @ (columns @ root).T
        variance -= (columns @ root).square().sum(1)
        factor = torch.cat([factor, columns @ root], dim=1)
    return chosen


def _pinv(matrix: Tensor, tolerance: float) -> Tensor:
    """Return the pseudo-inverse of a covariance; directions below `tolerance` count as nought."""
    inverse: Tensor = torch.linalg.pinv(matrix, atol=tolerance, rtol=0.0, hermitian=True)
    return inverse


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a positive semi-definite matrix and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > RANK_TOLERANCE * values.max().clamp_min(1e-30)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(keep, 1 / root.clamp_min(1e-30), 0)
    return (vectors * (root * keep)) @ vectors.T, (vectors * inverse) @ vectors.T


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
