"""Training samples that are held out while the child is finetuned, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimfuse.finetune.loop import Loss
from slimfuse.finetune.validate import Validation
from slimfuse.recipe import Validation as Spec
from slimfuse.tasks import Samples, answers_of

if TYPE_CHECKING:
    from slimfuse.pipeline.stages import BaseStages


@dataclass(frozen=True)
class Parts:
    """The places of the training samples that are learnt from, and of those that are held out."""

    learnt: Tensor
    held_out: Tensor


def parts(count: int, spec: Spec | None, seed: int) -> Parts:
    """Return a seeded division of the training samples; without `spec` all are learnt from.

    At least one is on each side, where there are two.
    """
    every = torch.arange(count)
    if spec is None or count < 2:
        return Parts(every, every[:0])
    size = min(max(1, round(count * spec.share)), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7_919 + 31))
    return Parts(order[size:].sort().values, order[:size].sort().values)


def learnt(count: int, spec: Spec | None) -> int:
    """Return how many of so many samples are learnt from."""
    return len(parts(count, spec, 0).learnt)


def validation(
    stages: BaseStages, spec: Spec, samples: Samples, places: Tensor, loss: Loss
) -> Validation:
    """Return what chooses the best weights: the task's metric where there are labels, else `loss`.

    places: of the held-out samples; loss: of the training.
    """
    task = stages.job.task
    chunks = by_length(samples, places).split(task.batch_size)

    def metric(model: nn.Module) -> float:
        answer = answers_of(model, task.output)
        parts = [
            task.reduce(answer(inputs), inputs, labels)
            for inputs, labels in (task.examples(samples, chunk) for chunk in chunks)
        ]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return task.figure(joined).value

    def mean_loss(model: nn.Module) -> float:
        found = [float(loss(model, chunk)) * len(chunk) for chunk in chunks]
        return sum(found) / len(places)

    if task.compares:
        return Validation(mean_loss, False, spec.every, spec.patience, "held-out loss")
    larger = task.metric.better == "higher"
    return Validation(metric, larger, spec.every, spec.patience, f"held-out {task.metric.key}")


def by_length(samples: Samples, places: Tensor) -> Tensor:
    """Return the places in the order in which batches pad least."""
    lengths = samples.lengths
    return places if lengths is None else places[lengths[places].argsort(stable=True)]
