"""Magnitude saliency: the control every second-order score has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude(out: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm (len(groups),) of what each group of units writes.

    out: (p, n) output weights; groups: index tensors into n.
    """
    return torch.stack([out[:, g].norm() for g in groups])
