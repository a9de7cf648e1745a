"""What diagnostics have to know of a task: what its answers are, and which of them count."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimfuse.batch import Batch, Inputs
from slimfuse.diagnose.answers import Kind, Read
from slimfuse.tasks import Task
from slimfuse.tasks.criteria import Categorical, Direction, Several


def kind_of(task: Task) -> Kind:
    """Return what a task's answers are."""
    if isinstance(task.criterion, Categorical):
        return "classes"
    return "labels" if isinstance(task.criterion, Several) else "numbers"


def reading(task: Task, *, labels: bool = True) -> Read:
    """Return what takes a model's rows that count, and their goals where `labels` count.

    Embeddings are read as directions, of length 1.
    """
    turned = isinstance(task.criterion, Direction)

    def read(output: Any, inputs: Inputs, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert isinstance(inputs, Batch) and given is not None, "a task's samples"
        rows, goals = task.rows(getattr(output, task.output), inputs, given)
        if turned:
            return nn.functional.normalize(rows, dim=1), None
        return rows, goals if labels else None

    return read
