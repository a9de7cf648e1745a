"""Held-out samples amid a training: when to stop, and which weights were the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from slimfuse.finetune.checkpoint import Progress, write_tensors
from slimfuse.finetune.several import whole


@dataclass(frozen=True)
class Validation:
    """What is measured on held-out samples, and what follows from it.

    measure: takes the model in evaluation mode; larger: whether more is better; every: steps
    between two measurements, the last step is always one; patience: how many measurements in a row
    may be no better before training ends, None for all; name: what is measured.
    """

    measure: Callable[[nn.Module], float]
    larger: bool
    every: int
    patience: int | None = None
    name: str = "held out"

    def due(self, step: int, steps: int) -> bool:
        """Return whether to measure behind a step, counted from 1."""
        return step % self.every == 0 or step == steps

    def judge(
        self,
        model: nn.Module,
        step: int,
        progress: Progress,
        best: Path,
        *,
        write: bool = True,
        agree: Callable[[float], float] = float,
    ) -> float:
        """Measure a model, keep its weights in `best` where it is the best yet, and say its value.

        A value that isn't finite is never the best. progress is brought up to date. write: whether
        this is the process that writes; agree: gives the value that all processes go by.
        """
        value = agree(self.measure(model))
        gap = value - progress.best if self.larger else progress.best - value
        if math.isfinite(value) and (math.isnan(progress.best) or gap > 0):
            tensors = {k: whole(v) for k, v in model.state_dict().items()}
            if write:
                write_tensors(tensors, best)
            progress.best, progress.best_step, progress.watched = value, step, 0
        else:
            progress.watched += 1
        if self.patience is not None and progress.watched >= self.patience:
            progress.stopped = True
        return value

    def best_of(self, model: nn.Module, progress: Progress, best: Path) -> None:
        """Give a model the weights that were the best; without any it stays as it is."""
        if progress.best_step:
            model.load_state_dict(load_file(best))

    def check(self, progress: Progress, best: Path) -> None:
        """Forget the best weights that a checkpoint speaks of where they are damaged or gone."""
        try:
            if progress.best_step:
                load_file(best)
        except (SafetensorError, OSError):
            progress.best, progress.best_step = math.nan, 0
