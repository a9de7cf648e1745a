"""ZipLM: units go one after the other, each time those whose loss the others mend best.

The layer y = W x is refitted to what is left after every step: with H = E[x xᵀ] + λI, taking the
columns R away costs ρ_R = tr(W_:R ([H⁻¹]_RR)⁻¹ W_:Rᵀ), and then W ← W − W_:R ([H⁻¹]_RR)⁻¹ [H⁻¹]_R:
and H⁻¹ ← H⁻¹ − [H⁻¹]_:R ([H⁻¹]_RR)⁻¹ [H⁻¹]_R:. What stays is at every step the ridge least squares
about W of the whole layer on what is kept. `fuse.greedy` goes the other way: it adds the unit
that explains most, which is cheaper where few are kept.
Source: Kurtić et al. 2023 (ZipLM, arXiv 2302.04089), section 3; saliency.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfuse.saliency.activity import Seen, second_moments
from slimfuse.saliency.units import Scores, Subject, gathered, scorer

DAMPING = 1e-3
BLOCK = (
    64  # units between two rank-BLOCK products; between them only vectors are brought up to date
)


@dataclass(frozen=True)
class Elimination:
    """Groups in the order in which they went, and what each of them cost when it went."""

    order: tuple[int, ...]
    costs: tuple[float, ...]

    def kept(self, count: int) -> list[int]:
        """Return the groups that went last, in their own order."""
        return sorted(self.order[len(self.order) - count :])

    @property
    def scores(self) -> Tensor:
        """The cost (groups,) up to which a group stays: the largest cost of those until it went.

        Strictly rising along the order, so that the largest scores are those of `kept`.
        """
        found = torch.zeros(len(self.order), dtype=torch.float64)
        level = -math.inf
        for group, cost in zip(self.order, self.costs, strict=True):
            level = max(cost, math.nextafter(level, math.inf))
            found[group] = level
        return found.clamp_min(0)


def inverse_second(second: Tensor, damping: float = DAMPING) -> Tensor:
    """Return (E[x xᵀ] + λI)⁻¹ (n, n), λ = damping · mean diagonal, by Cholesky."""
    scale = second.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped = second.double() + damping * scale * torch.eye(len(second), dtype=torch.float64)
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return inverse


def joint_cost(inverse: Tensor, out: Tensor, group: Tensor) -> Tensor:
    """Return ρ_R = tr(W_:R ([H⁻¹]_RR)⁻¹ W_:Rᵀ), what it costs if a group of units goes at once."""
    part = out[:, group]
    cost: Tensor = (torch.linalg.solve(inverse[group][:, group], part.T) * part.T).sum()
    return cost


def refitted(inverse: Tensor, out: Tensor, gone: Tensor) -> Tensor:
    """Return the weights (p, n) after a group went at once; its columns are noughts."""
    change = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    left: Tensor = out - out[:, gone] @ change
    left[:, gone] = 0
    return left


def eliminate(
    second: Tensor,
    out: Tensor,
    groups: Sequence[Tensor] | None = None,
    *,
    damping: float = DAMPING,
) -> Elimination:
    """Return the greedy order of all groups (single units without), the cheapest first.

    second: E[x xᵀ] (n, n); out: W (p, n); groups: index tensors into n that don't overlap.
    Exact; n³ work, of which all but vectors are matrix products for single units.
    """
    out = out.double()
    if len(out) > out.shape[1]:  # the costs know W only by WᵀW
        out = torch.linalg.qr(out, mode="r").R
    inverse = inverse_second(second, damping)
    if groups is None or all(len(g) == 1 for g in groups):
        flat = torch.arange(len(second)) if groups is None else torch.cat(list(groups))
        return _units(inverse[flat][:, flat], out[:, flat])
    return _groups(inverse, out, list(groups))


def _units(inverse: Tensor, out: Tensor) -> Elimination:
    """Eliminate single units: W and H⁻¹ as they were a few steps ago, less low-rank products."""
    inverse, out, n = inverse.clone(), out.clone(), len(inverse)
    order: list[int] = []
    costs: list[float] = []
    gone = torch.zeros(n, dtype=torch.bool)
    while len(order) < n:
        size = min(BLOCK, n - len(order))
        rows = torch.zeros(n, size, dtype=inverse.dtype)  # U: H⁻¹ now is H⁻¹ − U Uᵀ …
        columns = torch.zeros(len(out), size, dtype=out.dtype)  # … and W now is W − A Uᵀ
        diagonal, squares = inverse.diagonal().clone(), out.square().sum(0)
        for k in range(size):
            cost = (squares / diagonal.clamp_min(1e-300)).masked_fill(gone, torch.inf)
            unit = int(cost.argmin())
            done, seen = rows[:, :k], columns[:, :k]
            root = diagonal[unit].sqrt()
            u = (inverse[:, unit] - done @ done[unit]) / root
            a = (out[:, unit] - seen @ done[unit]) / root
            inner = out.T @ a - done @ (seen.T @ a)
            squares = (squares - 2 * u * inner + u.square() * a.square().sum()).clamp_min(0)
            diagonal = diagonal - u.square()
            rows[:, k], columns[:, k] = u, a
            order.append(unit)
            costs.append(float(cost[unit]))
            gone[unit] = True
        inverse -= rows @ rows.T
        out -= columns @ rows.T
        out[:, gone] = 0
    return Elimination(tuple(order), tuple(costs))


def _groups(inverse: Tensor, out: Tensor, groups: list[Tensor]) -> Elimination:
    inverse, out = inverse.clone(), out.clone()
    order: list[int] = []
    costs: list[float] = []
    while len(order) < len(groups):
        found = [
            torch.inf if i in order else float(joint_cost(inverse, out, g))
            for i, g in enumerate(groups)
        ]
        best = min(range(len(groups)), key=found.__getitem__)
        order.append(best)
        costs.append(found[best])
        group = groups[best]
        inverse_group = inverse[group]
        change = torch.linalg.solve(inverse_group[:, group], inverse_group)
        out -= out[:, group] @ change
        inverse -= inverse[:, group] @ change
    return Elimination(tuple(order), tuple(costs))


@scorer("ziplm", reads="activations", source="Kurtić et al. 2023, arXiv 2302.04089, section 3")
def ziplm(subject: Subject) -> Scores:
    """Return the costs up to which units stay, as shares of what their readers give in all.

    Heads go whole; their units' scores are those of single units. The stream's readers, of all
    depths, are one layer on the mean second moment of what they read.
    """

    def shares(seen: Seen) -> Iterator[tuple[str, Tensor]]:
        total = float((seen.out @ seen.second * seen.out).sum()) or 1.0
        for name, groups in seen.groups():
            yield name, eliminate(seen.second, seen.out, groups).scores / total

    return gathered(pair for seen in second_moments(subject) for pair in shares(seen))
