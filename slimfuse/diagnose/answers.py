"""Rows of answers as distributions: their losses, divergences and curvatures, by what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from slimfuse.batch import Inputs

Kind = Literal["classes", "labels", "numbers"]
"""Logits of one class of several; of any of several labels; numbers with a normal error of 1."""
Read = Callable[[Any, Inputs, Tensor | None], tuple[Tensor, Tensor | None]]
"""What a model returned, its inputs, labels -> the rows that count (rows, m), and their goals."""
Labelled = tuple[Inputs, Tensor | None]
"""Inputs and their labels, None where there are none."""


def losses(kind: Kind, rows: Tensor, goals: Tensor) -> Tensor:
    """Return −log p(goals) of each row (rows,), up to a constant."""
    if kind == "classes":
        return nn.functional.cross_entropy(rows, goals.to(rows.device), reduction="none")
    goals = goals.to(rows).view_as(rows)
    if kind == "labels":
        found = nn.functional.binary_cross_entropy_with_logits(rows, goals, reduction="none")
        return found.sum(1)
    return (rows - goals).square().sum(1) / 2


def divergences(kind: Kind, before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before ‖ after) of each row (rows,), in nats."""
    before, after = before.double(), after.double()
    if kind == "classes":
        sure, other = before.log_softmax(1), after.log_softmax(1)
        return (sure.exp() * (sure - other)).sum(1)
    if kind == "labels":
        gap = nn.functional.logsigmoid(before) - nn.functional.logsigmoid(after)
        rest = nn.functional.logsigmoid(-before) - nn.functional.logsigmoid(-after)
        share = before.sigmoid()
        return (share * gap + (1 - share) * rest).sum(1)
    return (before - after).square().sum(1) / 2


def slopes(kind: Kind, rows: Tensor, goals: Tensor) -> Tensor:
    """Return ∂loss/∂rows (rows, m)."""
    if kind == "classes":
        hot = nn.functional.one_hot(goals.to(rows.device), rows.shape[1]).to(rows)
        return rows.softmax(1) - hot
    goals = goals.to(rows).view_as(rows)
    return (rows.sigmoid() if kind == "labels" else rows) - goals


def curved(kind: Kind, rows: Tensor, tangents: Tensor) -> Tensor:
    """Return H t (rows, m): the loss' second derivative by the rows, along tangents t.

    It is the Fisher information of the answers: no goal is needed.
    """
    if kind == "classes":
        share = rows.softmax(1)
        return share * (tangents - (share * tangents).sum(1, keepdim=True))
    if kind == "labels":
        share = rows.sigmoid()
        return share * (1 - share) * tangents
    return tangents


def rooted(kind: Kind, rows: Tensor, noise: Tensor) -> Tensor:
    """Return S ξ (rows, m) with S Sᵀ = H, see `curved`: of noise ξ of unit covariance."""
    if kind == "classes":
        share = rows.softmax(1)
        root = share.sqrt() * noise
        return root - share * (share.sqrt() * noise).sum(1, keepdim=True)
    if kind == "labels":
        share = rows.sigmoid()
        return (share * (1 - share)).sqrt() * noise
    return noise


def flat(output: Any, inputs: Inputs, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return all logits of a model as rows: its output, or what that calls `logits`."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found.reshape(-1, found.shape[-1]), labels
