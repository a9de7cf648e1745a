"""What a shape costs, and the largest shape of a ladder that a budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from slimfuse.errors import ShapeError
from slimfuse.families import Family, Shape
from slimfuse.shapes.wish import Budget, Kind

TimeRatio = Callable[[Any], float]


class Meter:
    """Legality and cost of shapes under one parent's config; each is worked out once.

    time_ratio: measured median latency of a config divided by the parent's.
    """

    def __init__(self, config: Any, family: Family, time_ratio: TimeRatio | None = None) -> None:
        self.config, self.family, self.time_ratio = config, family, time_ratio
        self.top = family.shape(config)
        self.measured: dict[Shape, float] = {}  # in the order of measuring
        self._configs: dict[Shape, Any] = {}
        self._params: dict[Shape, int] = {}

    def narrow(self, shape: Shape) -> Any:
        """Return the config with this shape; raises the family's ShapeError."""
        if shape not in self._configs:
            try:
                self._configs[shape] = self.family.narrow(self.config, shape)
            except ShapeError as error:
                self._configs[shape] = error
        found = self._configs[shape]
        if isinstance(found, ShapeError):
            raise found
        return found

    def why_illegal(self, shape: Shape) -> ShapeError | None:
        """Return the family's refusal, or None for a legal shape."""
        try:
            self.narrow(shape)
        except ShapeError as error:
            return error
        return None

    @cached_property
    def tied(self) -> bool:
        """Whether the class knows the MLP's width only as a whole multiple of the stream's."""
        less = replace(self.top, intermediate_size=self.top.intermediate_size - 1)
        error = self.why_illegal(less)
        return error is not None and error.where == "target.intermediate_size"

    def params(self, shape: Shape) -> int:
        """Return the number of weights, counted on the family's own model without memory."""
        if shape not in self._params:
            with torch.device("meta"):
                model = self.family.build(self._config(shape))
            self._params[shape] = sum(p.numel() for p in model.parameters())
        return self._params[shape]

    def flops(self, shape: Shape) -> int:
        """Return the floating-point operations of one sample."""
        return self.family.flops(self._config(shape))

    def latency_ratio(self, shape: Shape) -> float:
        """Return the measured latency over the parent's; the parent itself isn't measured."""
        if shape == self.top:
            return 1.0
        if shape not in self.measured:
            if self.time_ratio is None:
                raise ValueError("a latency budget needs time_ratio")
            ratio = self.time_ratio(self.narrow(shape))
            assert math.isfinite(ratio) and ratio > 0, ratio
            self.measured[shape] = ratio
        return self.measured[shape]

    def amount(self, kind: Kind, shape: Shape) -> float:
        """Return what a budget of this kind counts."""
        match kind:
            case "params":
                return self.params(shape)
            case "flops":
                return self.flops(shape)
            case "latency_ratio":
                return self.latency_ratio(shape)

    def meets(self, budget: Budget, shape: Shape) -> bool:
        """Say whether a shape is within the budget."""
        return budget.meets(self.amount(budget.kind, shape), self.amount(budget.kind, self.top))

    def _config(self, shape: Shape) -> Any:
        # the parent is itself even where `narrow` would refuse to make it
        return self.config if shape == self.top else self.narrow(shape)


def largest(rungs: Sequence[Shape], budget: Budget, meter: Meter) -> int | None:
    """Return the index of the largest rung that meets the budget, None if none does.

    rungs: from the largest down. Bisection, at most ⌈log₂(n + 1)⌉ amounts: the index returned
    was seen to meet the budget and the one before it to miss, so a noisy latency can misplace
    the border but never pass a rung that wasn't measured. None means the last rung was seen to
    miss.
    """
    if rungs[0] == meter.top and meter.meets(budget, meter.top):  # costs no measurement
        return 0
    missed, met = -1, len(rungs)
    while met - missed > 1:
        middle = (missed + met) // 2
        if meter.meets(budget, rungs[middle]):
            met = middle
        else:
            missed = middle
    return met if met < len(rungs) else None
