"""Magnitude saliency: the control every second-order score has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slimfuse.saliency.units import Scores, Subject, scorer, sites
from slimfuse.spaces import Atlas, Role


def magnitude(out: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm (len(groups),) of what each group of units writes.

    out: (p, n) output weights; groups: index tensors into n.
    """
    return torch.stack([out[:, g].norm() for g in groups])


def powers(
    state: Mapping[str, Tensor],
    atlas: Atlas,
    spaces: Sequence[str],
    role: Role = Role.WRITE,
    power: float = 2,
) -> Tensor:
    """Return Σ|w|^power (n,) of all weights with which each unit is written, or read.

    spaces: one, or those of a flattened axis, whose units are then (n₁·n₂·…,), outermost first.
    """
    sizes = [atlas.spaces[s].size for s in spaces]
    total = torch.zeros(sizes, dtype=torch.float64)
    for name in atlas.users(spaces[0], role):
        for dim, axis in enumerate(atlas.axes[name]):
            legs = [leg.space for leg in axis]
            if not all(any(leg.space == s and leg.role is role for leg in axis) for s in spaces):
                continue
            whole = state[name].detach().double().cpu().abs().pow(power)
            whole = whole.unflatten(dim, [atlas.spaces[s].size for s in legs])
            kept = [dim + legs.index(s) for s in spaces]
            others = [d for d in range(whole.ndim) if d not in kept]
            total += whole.sum(others) if others else whole
    return total.flatten()


def _scores(subject: Subject, power: float) -> Scores:
    state, layout = subject.model.state_dict(), subject.layout
    found: Scores = {}
    for site in sites(subject.atlas, layout):
        names: list[tuple[str, ...]] = [(s,) for s in site.reports]
        for spaces in dict.fromkeys([site.spaces, *names]):
            # a channel is what is written to it; of other units what is done with them counts
            role = Role.WRITE if spaces == (layout.stream_space,) else Role.READ
            if "qk" in {subject.atlas.spaces[s].kind for s in spaces}:
                role = Role.WRITE  # queries write what keys read
            found[" ".join(spaces)] = powers(state, subject.atlas, spaces, role, power)
    return found


@scorer("magnitude", reads="weights", source="LeCun et al. 1989; saliency.md")
def l2(subject: Subject) -> Scores:
    """Return the squared L2 norm of the weights that read a unit, or write a channel or query.

    Squared, as the other scores are: masses take the root.
    """
    return _scores(subject, 2)


@scorer("l1", reads="weights", source="Li et al. 2017, arXiv 1608.08710")
def l1(subject: Subject) -> Scores:
    """Return the squared L1 norm of the same weights."""
    return {name: found.square() for name, found in _scores(subject, 1).items()}
