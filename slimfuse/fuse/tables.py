"""Tables with a row for every token of a vocabulary: too large for a float64 copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ROWS = 4096


def slices(rows: int) -> Iterator[slice]:
    """Yield slices of a few thousand rows each, which cover all `rows`."""
    for start in range(0, rows, ROWS):
        yield slice(start, min(start + ROWS, rows))


def centred_gram(tables: Sequence[Tensor]) -> Tensor:
    """Return Tᵀ P T (Σd, Σd), float64, of tables (rows, d) side by side.

    P removes the mean over rows: of logits, what softmax doesn't see.
    """
    size = sum(table.shape[1] for table in tables)
    outer, total = torch.zeros(size, size).double(), torch.zeros(size).double()
    for part in slices(len(tables[0])):
        rows = torch.cat([table[part].double() for table in tables], dim=1)
        outer += rows.T @ rows
        total += rows.sum(0)
    return outer - torch.outer(total, total) / len(tables[0])
