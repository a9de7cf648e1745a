"""How far a model goes along −h before weights are removed (WoodTaylor)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from slimfuse.saliency.fisher import Reduce


def step_length(
    gradients: Iterable[Mapping[str, Tensor]],
    direction: Mapping[str, Tensor],
    damping: float,
    reduce: Reduce | None = None,
) -> float:
    """Return α = ḡᵀh/(hᵀF̂h), at most 1: the exact line search of the whole damped Fisher along −h.

    h = F⁻¹ḡ of one block, as if the others stood still, changes every sample's loss by about as
    much as all of it; of K blocks together it goes about K times too far. hᵀF̂h = mean (gᵢᵀh)² +
    `damping`, where ḡᵀh = mean gᵢᵀh, needs no F̂ but one more pass over the gradients (k, …).
    damping: Σ λ|h|² over all blocks. One block for the whole model gives 1. Source: K-FAC (Martens
    and Grosse 2015, arXiv 1503.05671), section 6.4, which rescales its steps by the exact F.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for found in gradients:
        along = sum(
            found[name].flatten(1).double() @ h.flatten().to(found[name].device)
            for name, h in direction.items()
        )
        assert isinstance(along, Tensor)
        sums += torch.stack(
            [along.sum(), along.square().sum(), torch.tensor(1.0 * len(along))]
        ).cpu()
    total, squares, count = (sums if reduce is None else reduce(sums)).tolist()
    curvature = squares / count + damping
    return min(1.0, total / count / curvature) if curvature > 0 else 1.0
