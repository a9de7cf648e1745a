"""Streamed second moments of activations: all that calibration has to remember."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 2048  # rows of one product
WIDE = 768  # from here on products are float32 …
BLOCK = 512  # … and, of a symmetric matrix, only the blocks on and above the diagonal are made


def precision(width: int, dtype: torch.dtype) -> torch.dtype:
    """Return the precision for products of rows so wide that were computed in `dtype`."""
    return torch.float32 if width >= WIDE and dtype != torch.float64 else torch.float64


class Moments:
    """Weighted mean and covariance of several sites seen on the same rows.

    Memory is the square of the sites' joint width, however many rows are seen. Sums are kept in
    float64 about a shift taken from the first rows, so that a large mean costs no digits. products:
    the precision of the products of 2 048 rows each; float32 halves the time of wide moments and
    costs 1e-7 of the largest variances. reduce: sums a tensor in place over processes that see
    different rows; all have to read the moments at the same point, and see no rows afterwards.
    """

    def __init__(
        self,
        products: torch.dtype = torch.float64,
        reduce: Callable[[Tensor], Tensor] | None = None,
        **widths: int,
    ) -> None:
        self.widths = widths
        self.products, self._reduce = products, reduce
        self._shared = reduce is None
        edges = torch.tensor([0, *widths.values()]).cumsum(0).tolist()
        self._slices = {
            site: slice(a, b) for site, a, b in zip(widths, edges, edges[1:], strict=False)
        }
        size = edges[-1]
        self.weight = 0.0
        self._shift: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._whole = True  # below the diagonal too
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._outer = torch.zeros(size, size, dtype=torch.float64)

    def update(self, weights: Tensor | None = None, **rows: Tensor) -> None:
        """Add rows (n, width) of every site; `weights` (n,) defaults to ones."""
        assert self._reduce is None or not self._shared, "rows after the sums were shared"
        joint = torch.cat([rows[site].cpu().to(self.products) for site in self.widths], dim=1)
        if not len(joint):
            return
        w = torch.ones(len(joint)) if weights is None else weights
        w = w.cpu().to(self.products)
        if self._shift is None:
            self._shift = joint.double().mean(0)
        self.weight += float(w.double().sum())
        self._waiting.append((joint, w))
        if sum(len(w) for _, w in self._waiting) >= CHUNK:
            self._add()

    def _add(self) -> None:
        """Add the rows that wait: one product of many rows costs less than many of few."""
        assert self._shift is not None, "rows wait without a shift"
        joint, weights = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        size = len(self._sum)
        for part, share in zip(joint.split(CHUNK), weights.split(CHUNK), strict=True):
            centred = part - self._shift.to(self.products)
            weighted = centred * share[:, None]
            self._sum += weighted.sum(0)
            for start in range(0, size, BLOCK):
                stop = min(start + BLOCK, size)
                self._outer[start:stop, start:] += weighted[:, start:stop].T @ centred[:, start:]
        self._whole = False

    def _settle(self) -> None:
        """Make the sums whole, to be read."""
        if self._waiting:
            self._add()
        if not self._shared:
            self._share()
        if self._whole:
            return
        for start in range(BLOCK, len(self._sum), BLOCK):
            stop = start + BLOCK
            self._outer[start:stop, :start] = self._outer[:start, start:stop].T
        self._whole = True

    def merge(self, other: Moments) -> None:
        """Add what `other` saw (another shard of the same sites)."""
        if other._shift is None:
            return
        if self._shift is None:
            self._shift = other._shift
        self._settle()
        other._settle()
        outer, total = other._about(self._shift)
        self._outer += outer
        self._sum += total
        self.weight += other.weight

    def _about(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of products and of rows about another shift."""
        assert self._shift is not None, "no rows were seen"
        gap = self._shift - shift
        outer = self._outer + torch.outer(gap, self._sum) + torch.outer(self._sum, gap)
        return outer + self.weight * torch.outer(gap, gap), self._sum + self.weight * gap

    def _share(self) -> None:
        """Sum over all processes, about the mean of their shifts."""
        assert self._reduce is not None, "nothing to share by"
        self._shared = True
        size, seen = len(self._sum), self._shift is not None
        told = torch.zeros(size + 2, dtype=torch.float64)
        if self._shift is not None:
            told[:size], told[size], told[size + 1] = self._shift, 1, self.weight
        told = self._reduce(told)
        if not told[size]:
            return
        common = told[:size] / told[size]
        if seen:
            self._outer, self._sum = self._about(common)
        self._reduce(self._outer)
        self._reduce(self._sum)
        self._shift, self.weight, self._whole = common, float(told[size + 1]), False

    def mean(self, site: str) -> Tensor:
        """Return the weighted mean (width,) of a site."""
        self._settle()
        assert self._shift is not None, "no rows were seen"
        return (self._shift + self._sum / self.weight)[self._slices[site]]

    def cov(self, a: str, b: str | None = None) -> Tensor:
        """Return the covariance (width of a, width of b) of two sites (b defaults to a)."""
        self._settle()
        rows, columns = self._slices[a], self._slices[b or a]
        mean = self._sum / self.weight
        return self._outer[rows, columns] / self.weight - torch.outer(mean[rows], mean[columns])

    def second(self, a: str, b: str | None = None) -> Tensor:
        """Return E[x_a x_bᵀ] (width of a, width of b) about zero (b defaults to a)."""
        return self.cov(a, b) + torch.outer(self.mean(a), self.mean(b or a))
