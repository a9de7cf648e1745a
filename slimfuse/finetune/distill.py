"""What a training step minimises: labels, the teachers' answers, or a mix of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, call, token_mask
from slimfuse.finetune.hidden import Hidden, observing
from slimfuse.tasks import Criterion, Task

Fetch = Callable[[Tensor], tuple[Batch, Tensor]]
"""Sample indices (batch,) -> model inputs and labels."""


@dataclass(frozen=True)
class Lesson:
    """What is taught of some samples.

    rows: what the teachers say of the rows that count; streams: what the child's shall be behind
    each of its blocks, where that is taught.
    """

    rows: Tensor
    streams: tuple[Tensor, ...] = ()


Teach = Callable[[Tensor, Batch, Tensor], Lesson]
"""Sample indices, inputs, labels -> the lesson."""
Loss = Callable[[nn.Module, Tensor], Tensor]


def labels_loss(task: Task, fetch: Fetch, label_smoothing: float = 0.0) -> Loss:
    """Return the task's loss against labels, as a loss of (model, indices)."""

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        rows, labels = answered(task, model, *fetch(indices))
        if not len(rows):  # nothing of this batch was masked, or it has no second token
            return rows.sum()
        found = task.criterion.labelled(rows, labels, label_smoothing)
        assert found is not None, f"{task.name} has no labels to learn from"
        return found

    return loss


def distillation_loss(
    task: Task,
    fetch: Fetch,
    teach: Teach,
    *,
    temperature: float,
    hardness: float,
    criterion: Criterion | None = None,
    label_smoothing: float = 0.0,
    hidden: Hidden | None = None,
) -> Loss:
    """Return `hardness`·(distance from the teachers) + (1 - `hardness`)·(loss against labels).

    criterion: the task's, or what it has become for this training. Without labels the teachers
    are all there is. hidden: adds its weight times the distance of the child's streams from the
    lesson's.
    """
    judge = criterion or task.criterion

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        inputs, goals = fetch(indices)
        plain = getattr(model, "module", model)  # what several processes share wraps it
        with observing(plain, () if hidden is None else hidden.blocks) as seen:
            rows, labels = answered(task, model, inputs, goals)
        lesson = teach(indices, inputs, goals)
        total = torch.zeros((), device=rows.device)
        if hidden is not None:
            mask = token_mask(inputs)
            streams = [stream.to(rows.device) for stream in lesson.streams]
            apart = hidden.distance(seen, streams, None if mask is None else mask.to(rows.device))
            total = total + hidden.weight * apart
        if not len(rows):
            return total + rows.sum()
        told = judge.taught(rows, lesson.rows.to(rows.device), temperature)
        hard = judge.labelled(rows, labels, label_smoothing)
        return total + (told if hard is None else hardness * told + (1 - hardness) * hard)

    return loss


def answered(task: Task, model: nn.Module, inputs: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's float32 rows that count, and their labels, where the model is."""
    like = next(model.parameters())
    given = inputs.to(like.device, like.dtype)
    output = getattr(call(model, given), task.output)
    rows, labels = task.rows(output, given, labels.to(like.device))
    return rows.float(), labels


@torch.no_grad()
def told(task: Task, model: nn.Module, inputs: Batch, labels: Tensor) -> Tensor:
    """Return a teacher's rows that count."""
    return answered(task, model, inputs, labels)[0]
