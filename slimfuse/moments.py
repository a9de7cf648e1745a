"""Streamed second moments of activations: all that calibration has to remember."""

from __future__ import annotations

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
    costs 1e-7 of the largest variances.
    """

    def __init__(self, products: torch.dtype = torch.float64, **widths: int) -> None:
        self.widths = widths
        self.products = products
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
        gap = other._shift - self._shift
        self._outer += other._outer + torch.outer(gap, other._sum) + torch.outer(other._sum, gap)
        self._outer += other.weight * torch.outer(gap, gap)
        self._sum += other._sum + other.weight * gap
        self.weight += other.weight

    def mean(self, site: str) -> Tensor:
        """Return the weighted mean (width,) of a site."""
        assert self._shift is not None, "no rows were seen"
        self._settle()
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
