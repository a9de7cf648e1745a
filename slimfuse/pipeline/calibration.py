"""The draw of samples that fusions and scores are calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimfuse.data import Split
from slimfuse.data.base import draw
from slimfuse.recipe import Calibration
from slimfuse.tasks import Samples, Task


def calibration(
    task: Task,
    train: Split,
    processor: Any,
    spec: Calibration,
    size: int,
    whole: Callable[[], Samples],
) -> tuple[Samples, tuple[Tensor, ...]]:
    """Return samples of one size, and in batches the indices of those for calibration.

    Of joined texts they are whole blocks of the training set (`whole`), else a draw of its samples.
    """
    if task.joins:
        samples = whole()
        return samples, torch.from_numpy(draw(len(samples), spec.samples, spec.seed)).split(size)
    samples = task.samples(train.sample(spec.samples, spec.seed), processor, uniform=True)
    return samples, torch.arange(len(samples)).split(size)
