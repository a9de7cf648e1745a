"""What a training sees as it goes: lines in the run's log, and curves for TensorBoard."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any, Self

from slimfuse.store import Store

SECONDS = 10.0  # between two lines of the log


class Journal:
    """Takes the figures of every step of one stage; a `Log` of the loop.

    The log has a line every ten seconds, for the first and for every measurement on held-out
    samples; with `curves` every step is in RUN/tensorboard/STAGE.
    """

    def __init__(self, store: Store, stage: str, *, curves: bool) -> None:
        self.store, self.stage, self.curves = store, stage, curves
        self.told = -SECONDS
        self.writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures of a step, counted from 1; one that was left out has no loss."""
        known = {k: v for k, v in figures.items() if math.isfinite(v)}
        if self.curves:
            if self.writer is None:  # what a killed run wrote from here on doesn't count
                kind = summary_writer()
                self.writer = kind(
                    str(self.store.root / "tensorboard" / self.stage), purge_step=step
                )
            for name, value in known.items():
                self.writer.add_scalar(name, value, step)
        now = time.monotonic()
        if now - self.told >= SECONDS or "validation" in figures or "loss" not in known:
            self.told = now
            self.store.log(self.stage, "step", step=step, **known)


def summary_writer() -> Any:
    """Return TensorBoard's writer; `checks.check_extras` saw that it is installed."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter
