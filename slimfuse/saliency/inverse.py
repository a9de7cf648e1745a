"""The damped block Fisher F = λI + (1/m) Σ g gᵀ and its inverse, by four routes that agree.

Everything here is float64 and small enough to hold: n blocks of B weights each, the flattened
weights cut every B. Dense is one block. `fisher.Sums` streams the sums that these are made from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from slimfuse.errors import SlimfuseError, UserError

Route = Literal["gram", "samples", "rank-one", "diagonal"]


@dataclass(frozen=True)
class Damping:
    """λ: `value` times a mean diagonal of (1/m) Σ g gᵀ, or `value` itself.

    Of a layer by itself it is that layer's mean; where layers are compared, the geometric mean of
    the layer's and that of all (docs/decisions/0013). Relative damping moves with the scale of
    the loss; absolute values are those of the papers (WoodFisher 1e-5, oBERT 1e-7). Raises
    UserError for a value that is not positive.
    """

    value: float = 0.1
    relative: bool = True

    def __post_init__(self) -> None:
        if not (self.value > 0 and math.isfinite(self.value)):
            raise UserError(
                "damping must be positive: without it the Fisher has no inverse",
                got=self.value,
                allowed="a finite number above 0, 0.1 of the mean diagonal by default",
            )

    def of(self, mean_diagonal: float) -> float:
        """Return λ; a layer without any gradient gets the least positive normal number."""
        factor = mean_diagonal if self.relative else 1.0
        return max(self.value * factor, torch.finfo(torch.float64).tiny)


DAMPING = Damping()


def choose(samples: int, block: int) -> Route:
    """Return the cheapest exact route for m gradients and blocks of B weights.

    Grams (m ≥ B) cost B² a block whatever m is, the sample space (m < B) m² and all m gradients;
    blocks of one weight need no linear algebra.
    """
    if block == 1:
        return "diagonal"
    return "gram" if samples >= block else "samples"


class BlockInverse(ABC):
    """F⁻¹ of n blocks of B weights; vectors are (n, B), or (n, B, k) for k of them."""

    damping: float
    shape: tuple[int, int]

    @abstractmethod
    def times(self, vectors: Tensor) -> Tensor:
        """Return F v."""

    @abstractmethod
    def solve(self, vectors: Tensor) -> Tensor:
        """Return F⁻¹ v."""

    @abstractmethod
    def groups(self, size: int) -> Tensor:
        """Return [F⁻¹]_QQ (n, B/size, size, size) of each run Q of `size` weights."""

    @abstractmethod
    def restricted(self, kept: Tensor) -> BlockInverse:
        """Return the inverse of F where weights outside `kept` (n, B) are fixed.

        Rows and columns of fixed weights are λ times the identity's, so that what `solve` makes
        of a vector that is zero there is (F_KK)⁻¹ v_K, and zero there.
        """

    @abstractmethod
    def select(self, blocks: Tensor) -> BlockInverse:
        """Return the inverse of some blocks (q,), which may repeat."""

    @abstractmethod
    def curvature(self) -> Tensor:
        """Return the diagonal (n, B) of (1/m) Σ g gᵀ, without λ."""

    def diagonal(self) -> Tensor:
        """Return the diagonal (n, B) of F⁻¹."""
        return self.groups(1)[:, :, 0, 0]

    def dense(self) -> Tensor:
        """Return F⁻¹ (n, B, B)."""
        return self.groups(self.shape[1])[:, 0]

    def columns(self, indices: Tensor) -> Tensor:
        """Return F⁻¹ e_q (len(indices), B), each inside the block of its flat index q."""
        block = self.shape[1]
        units = torch.nn.functional.one_hot(indices % block, block).double()
        return self.select(indices // block).solve(units)

    def sub(self, indices: Tensor) -> Tensor:
        """Return [F⁻¹]_QQ (r, q, q) of r sets Q of q flat indices (r, q), each in one block."""
        sets, size = indices.shape
        columns = self.columns(indices.flatten()).view(sets, size, -1)
        places = (indices % self.shape[1])[:, None].expand(sets, size, size)
        return columns.gather(2, places)


class GramInverse(BlockInverse):
    """By Cholesky factors of λI + G; gram: G = (1/m) Σ g gᵀ (n, B, B)."""

    def __init__(self, gram: Tensor, damping: float) -> None:
        self.gram, self.damping, self.shape = gram, damping, (gram.shape[0], gram.shape[1])

    @cached_property
    def _factor(self) -> Tensor:
        return _cholesky(self.gram, self.damping)

    @cached_property
    def _inverse_factor(self) -> Tensor:
        return _lower_solve(self._factor, torch.eye(self.shape[1]).to(self.gram))

    def times(self, vectors: Tensor) -> Tensor:
        """Return λv + Gv."""
        return self.damping * vectors + _product(self.gram, vectors)

    def solve(self, vectors: Tensor) -> Tensor:
        """Return L⁻ᵀL⁻¹v."""
        return _solved(self._factor, vectors)

    def diagonal(self) -> Tensor:
        """Return the squared lengths of L⁻¹'s columns."""
        return _column_squares(self._inverse_factor)

    def groups(self, size: int) -> Tensor:
        """Return the products of L⁻¹'s columns inside each group."""
        return _grouped(self._inverse_factor, size)

    def restricted(self, kept: Tensor) -> BlockInverse:
        """Return the inverse with the Gram of the kept weights alone."""
        if bool(kept.all()):
            return self
        return GramInverse(self.gram * (kept[:, :, None] & kept[:, None]), self.damping)

    def select(self, blocks: Tensor) -> BlockInverse:
        """Return the inverse of some blocks."""
        return GramInverse(self.gram[blocks], self.damping)

    def curvature(self) -> Tensor:
        """Return the Gram's diagonal."""
        return self.gram.diagonal(dim1=1, dim2=2)


class SampleInverse(BlockInverse):
    """In the space of samples: F⁻¹ = (1/λ)(I − Xᵀ(mλI + XXᵀ)⁻¹X).

    rows: X (n, m, B). Source: the Woodbury identity.
    """

    def __init__(self, rows: Tensor, damping: float) -> None:
        self.rows, self.damping, self.shape = rows, damping, (rows.shape[0], rows.shape[2])

    @cached_property
    def _factor(self) -> Tensor:
        return _cholesky(self.rows @ self.rows.mT, self.rows.shape[1] * self.damping)

    def times(self, vectors: Tensor) -> Tensor:
        """Return λv + XᵀXv/m."""
        seen = _product(self.rows.mT, _product(self.rows, vectors))
        return self.damping * vectors + seen / self.rows.shape[1]

    def solve(self, vectors: Tensor) -> Tensor:
        """Return (v − Xᵀ(mλI + XXᵀ)⁻¹Xv)/λ."""
        inner = _solved(self._factor, _product(self.rows, vectors))
        return (vectors - _product(self.rows.mT, inner)) / self.damping

    def diagonal(self) -> Tensor:
        """Return (1 − Σ y²)/λ over the columns of Y = L⁻¹X."""
        return (1 - _column_squares(_lower_solve(self._factor, self.rows))) / self.damping

    def groups(self, size: int) -> Tensor:
        """Return (I − YᵀY)/λ inside each group, Y = L⁻¹X."""
        seen = _grouped(_lower_solve(self._factor, self.rows), size)
        return (torch.eye(size).to(seen) - seen) / self.damping

    def restricted(self, kept: Tensor) -> BlockInverse:
        """Return the inverse with the gradients of the kept weights alone."""
        return SampleInverse(self.rows * kept[:, None], self.damping)

    def select(self, blocks: Tensor) -> BlockInverse:
        """Return the inverse of some blocks."""
        return SampleInverse(self.rows[blocks], self.damping)

    def curvature(self) -> Tensor:
        """Return mean g²."""
        return self.rows.square().mean(1)


class RankOneInverse(SampleInverse):
    """By the recurrence F⁻¹ ← F⁻¹ − (F⁻¹g)(F⁻¹g)ᵀ/(m + gᵀF⁻¹g) from I/λ; the reference.

    Source: WoodFisher (arXiv 2004.14340), section 3.
    """

    @cached_property
    def _inverse(self) -> Tensor:
        blocks, samples, width = self.rows.shape
        inverse = (torch.eye(width).to(self.rows) / self.damping).repeat(blocks, 1, 1)
        for g in self.rows.unbind(1):
            h = _product(inverse, g)
            inverse -= h[:, :, None] * h[:, None] / (samples + (g * h).sum(1))[:, None, None]
        return inverse

    def solve(self, vectors: Tensor) -> Tensor:
        """Return F⁻¹v."""
        return _product(self._inverse, vectors)

    def diagonal(self) -> Tensor:
        """Return the diagonal of F⁻¹."""
        return self._inverse.diagonal(dim1=1, dim2=2)

    def groups(self, size: int) -> Tensor:
        """Return the diagonal blocks of F⁻¹."""
        n, width = self.shape
        cut = self._inverse.view(n, width // size, size, width // size, size)
        return cut.diagonal(dim1=1, dim2=3).movedim(3, 1)

    def restricted(self, kept: Tensor) -> BlockInverse:
        """Return the inverse with the gradients of the kept weights alone."""
        return RankOneInverse(self.rows * kept[:, None], self.damping)

    def select(self, blocks: Tensor) -> BlockInverse:
        """Return the inverse of some blocks."""
        return RankOneInverse(self.rows[blocks], self.damping)


class DiagonalInverse(BlockInverse):
    """Of a diagonal F = λI + diag(v) (n, B); v = 0 and λ = 1 is what magnitude takes F for."""

    def __init__(self, values: Tensor, damping: float) -> None:
        self.values, self.damping, self.shape = values, damping, (values.shape[0], values.shape[1])

    def times(self, vectors: Tensor) -> Tensor:
        """Return (λ + v)·vectors."""
        return _like(self.damping + self.values, vectors) * vectors

    def solve(self, vectors: Tensor) -> Tensor:
        """Return vectors/(λ + v)."""
        return vectors / _like(self.damping + self.values, vectors)

    def groups(self, size: int) -> Tensor:
        """Return diagonal matrices."""
        return torch.diag_embed(runs(self.diagonal(), 1, size))

    def diagonal(self) -> Tensor:
        """Return 1/(λ + v)."""
        return 1 / (self.damping + self.values)

    def restricted(self, kept: Tensor) -> BlockInverse:
        """Return itself with λ alone at fixed weights."""
        return DiagonalInverse(self.values * kept, self.damping)

    def select(self, blocks: Tensor) -> BlockInverse:
        """Return the inverse of some blocks."""
        return DiagonalInverse(self.values[blocks], self.damping)

    def curvature(self) -> Tensor:
        """Return v."""
        return self.values


def invert(rows: Tensor, block: int, damping: float, *, route: Route | None = None) -> BlockInverse:
    """Return the block inverse of gradients (m, d) that are held whole, in float64.

    block: B, at most d; the last block is filled up with weights that have no gradient. damping:
    λ itself. route: by `choose` where None.
    """
    samples, size = rows.shape
    block = min(block, size)
    cut = cut_rows(rows.double(), block)
    way = route or choose(samples, block)
    if way == "gram":
        return GramInverse(cut.mT @ cut / samples, damping)
    if way == "diagonal":
        return DiagonalInverse(cut.square().mean(1), damping)
    return (SampleInverse if way == "samples" else RankOneInverse)(cut, damping)


def cut_rows(rows: Tensor, block: int) -> Tensor:
    """Return rows (k, d) cut every `block` entries, (n, k, block), zeros after the last."""
    missing = -rows.shape[1] % block
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return runs(rows, 1, block).transpose(0, 1)


def _column_squares(matrices: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(matrices, dim=1).square_()
    return found


def runs(values: Tensor, dim: int, size: int) -> Tensor:
    """Return values with an axis cut into runs of `size`."""
    found: Tensor = values.unflatten(dim, (-1, size))
    return found


def _cholesky(matrix: Tensor, damping: float) -> Tensor:
    """Return the factor of `matrix` + damping·I."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    diagonal.add_(damping)  # for a moment: cheaper than a copy of the whole
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal.copy_(before)
    if bool(failed.any()):
        raise SlimfuseError(
            "the damped Fisher is not positive definite: λ is below the rounding of its sums",
            got=f"λ = {damping:.3g}",
            hint="raise the damping, or compute the gradients in float64",
        )
    return factor


def _lower_solve(factor: Tensor, right: Tensor) -> Tensor:
    wide = right.expand(len(factor), *right.shape[-2:])
    result: Tensor = torch.linalg.solve_triangular(factor, wide, upper=False)
    return result


def _solved(factor: Tensor, vectors: Tensor) -> Tensor:
    if vectors.ndim == 3:
        return torch.cholesky_solve(vectors, factor)
    return torch.cholesky_solve(vectors[:, :, None], factor)[:, :, 0]


def _product(matrices: Tensor, vectors: Tensor) -> Tensor:
    if vectors.ndim == 3:
        return matrices @ vectors
    return (matrices @ vectors[:, :, None])[:, :, 0]


def _grouped(columns: Tensor, size: int) -> Tensor:
    """Return the inner products (n, B/size, size, size) of the columns (n, r, B) of each group."""
    cut = runs(columns, 2, size).transpose(1, 2)
    return cut.mT @ cut


def _like(diagonal: Tensor, vectors: Tensor) -> Tensor:
    return diagonal if vectors.ndim == 2 else diagonal[:, :, None]
