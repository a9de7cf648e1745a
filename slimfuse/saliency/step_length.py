"""How far a model goes along −h before weights are removed (WoodTaylor)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimfuse.saliency.fisher import Reduce

PROBE = 1 / 8  # of the step, over which the gradient's change is seen
Gradients = Callable[[], Iterable[Mapping[str, Tensor]]]
"""Gives the gradients (k, …) of the model as it is, of the same samples each time."""


def step_length(
    model: nn.Module,
    gradients: Gradients,
    direction: Mapping[str, Tensor],
    damping: float,
    reduce: Reduce | None = None,
) -> float:
    """Return α in 0 … 1, how far along −h the damped quadratic model of the whole loss is least.

    h = F⁻¹ḡ of one block, as if the others stood still, changes every sample's loss by about as
    much as all of it; of K blocks together it goes about K times too far. α = ḡᵀh/(c + `damping`)
    is the exact line search for a curvature c = hᵀCh along h, the larger of two: the empirical
    Fisher's, mean (gᵢᵀh)², and the loss's own, (ḡ(w) − ḡ(w − εh))ᵀh/ε, without which a model near
    a minimum goes far astray: there gradients vanish, and the empirical Fisher with them, but the
    curvature stays. Each is one pass over the gradients. damping: Σ λ|h|² over all blocks. The
    loss has to be the same function in both passes: not one against answers that are drawn anew.
    The model is left as it was. Source: K-FAC (Martens and Grosse 2015, arXiv 1503.05671),
    section 6.4, which rescales its steps by a curvature of the whole model.
    """
    slope, squares = _along(gradients(), direction, reduce)
    length = _ratio(slope, squares + damping)
    if length == 0:
        return length
    with _moved(model, direction, PROBE * length):
        beyond, _ = _along(gradients(), direction, reduce)
    curvature = (slope - beyond) / (PROBE * length)
    return min(length, _ratio(slope, curvature + damping)) if curvature > 0 else length


def _ratio(slope: float, curvature: float) -> float:
    return min(1.0, max(0.0, slope / curvature)) if curvature > 0 else 0.0


def _along(
    gradients: Iterable[Mapping[str, Tensor]],
    direction: Mapping[str, Tensor],
    reduce: Reduce | None,
) -> tuple[float, float]:
    """Return the means of gᵢᵀh and of its square."""
    sums = torch.zeros(3, dtype=torch.float64)
    for found in gradients:
        along = sum(
            found[name].flatten(1).double() @ h.flatten().to(found[name].device)
            for name, h in direction.items()
        )
        assert isinstance(along, Tensor)
        here = along.cpu()
        sums += torch.tensor([float(here.sum()), float(here.square().sum()), float(len(here))],
                             dtype=torch.float64)  # fmt: skip
    total, squares, count = (sums if reduce is None else reduce(sums)).tolist()
    return total / count, squares / count


@contextmanager
def _moved(model: nn.Module, direction: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Have a model's weights at w − step·h."""
    before = {name: model.get_parameter(name).detach().clone() for name in direction}
    try:
        with torch.no_grad():
            for name, h in direction.items():
                model.get_parameter(name).sub_(step * h.to(before[name]))
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
