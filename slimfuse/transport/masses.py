"""Masses of units: the marginals of a plan, uniform or in proportion to norms or saliencies."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(size: int) -> Tensor:
    """Return equal masses (size,) that sum to 1, in float64."""
    return torch.full((size,), 1 / size, dtype=torch.float64)


def masses(values: Tensor, *, power: float = 1.0, floor: float = 1e-3) -> Tensor:
    """Return positive masses (size,) that sum to 1, in float64, from values (size,) at least 0.

    mass_i ∝ max(v_i^power, floor · mean(v^power)). values: weight norms or saliencies of units.
    power: 0 gives uniform masses, 1 masses in proportion, a large one nearly selects the best
    units (fusion.md §6). floor: relative to the mean, so that no unit is lost altogether; values
    that are all 0 give uniform masses. Raises ValueError for negative, NaN or infinite values.
    """
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"masses need a vector of values, got shape {tuple(values.shape)}")
    if not (power >= 0 and power < float("inf") and floor > 0 and floor < float("inf")):
        raise ValueError(f"masses need power >= 0 and floor > 0, got {power=} and {floor=}")
    v = values.detach().double().cpu()
    bad = ~(torch.isfinite(v) & (v >= 0))
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            "masses need finite values of at least 0; "
            f"value {first} of {len(v)} is {float(v[first])}"
        )
    top = float(v.max())
    if top == 0:
        return uniform(len(v))
    powered = (v / top) ** power  # relative to the largest, so that no power overflows
    powered = powered.clamp_min(floor * float(powered.mean()))
    return powered / powered.sum()
