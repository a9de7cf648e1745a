"""The way down that loses least: shapes one step of one size apart, by what each size is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slimfuse.families import Shape
from slimfuse.shapes.budget import Meter
from slimfuse.shapes.ladder import changed, grid
from slimfuse.shapes.wish import Budget, Kind

Losses = Mapping[str, Sequence[float]]
"""By axis what is lost with only so many left: losses[axis][value], from 0 to the parent's size."""
STEPS = 32  # of an axis at most: each is built once to be counted


def descent(
    start: Shape, free: tuple[str, ...], meter: Meter, losses: Losses, kind: Kind
) -> list[Shape]:
    """Return shapes from `start` down, each with one size less than the one before.

    The step that is taken is, of one on every free axis, the one that loses least for what it
    saves of a budget's amount (of a latency: of FLOPs, which needn't be measured). Greedy, and
    optimal to a step where losses are convex and savings don't depend on the other sizes. Heads
    that are free with hidden_size fall with it, in whole heads of the parent's size. An MLP that is
    tied to hidden_size follows it.
    """
    counted: Kind = "flops" if kind == "latency_ratio" else kind
    tied = meter.tied and "hidden_size" in free
    heads_fall = {"hidden_size", "num_attention_heads"} <= set(free)
    units = meter.family.head_dims(meter.config)
    axes = [a for a in free if not (heads_fall and a == "num_attention_heads")]
    axes = [a for a in axes if not (tied and a == "intermediate_size")]
    values = {axis: _thinned(grid(axis, start, meter, follow=tied)) for axis in axes}
    if heads_fall:
        values["hidden_size"] = [units * h for h in range(1, start.num_attention_heads + 1)]

    def cut(shape: Shape, axis: str, value: int) -> Shape:
        if heads_fall and axis == "hidden_size":
            shape = changed(shape, "num_attention_heads", value // units)
        return changed(shape, axis, value, follow=tied)

    def lost(shape: Shape) -> float:
        return sum(float(losses[a][getattr(shape, a)]) for a in free if a in losses)

    rungs = [start]
    while True:
        shape, steps = rungs[-1], []
        for axis in axes:
            lower = [v for v in values[axis] if v < getattr(shape, axis)]
            tried = (cut(shape, axis, v) for v in reversed(lower))
            other = next((s for s in tried if meter.why_illegal(s) is None), None)
            if other is None:
                continue
            saved = meter.amount(counted, shape) - meter.amount(counted, other)
            if saved > 0:
                steps.append(((lost(other) - lost(shape)) / saved, other))
        if not steps:
            return rungs
        rungs.append(min(steps, key=lambda step: step[0])[1])


def refilled(
    start: Shape, shape: Shape, free: tuple[str, ...], meter: Meter, losses: Losses, budget: Budget
) -> Shape:
    """Return the shape with what a coarse step left of a counted budget given to other sizes.

    One size after the other grows as far as the budget and `start` allow, the one first that wins
    most. Heads and what follows hidden_size stay.
    """
    rest = [a for a in free if a not in ("num_attention_heads", "hidden_size") or len(free) == 1]
    rest += ["hidden_size"] if not meter.tied and "num_attention_heads" not in free else []
    while rest:
        grown = []
        for axis in rest:
            values = [v for v in grid(axis, start, meter) if v > getattr(shape, axis)]
            tried = (changed(shape, axis, v) for v in reversed(values))
            within = (s for s in tried if meter.why_illegal(s) is None and meter.meets(budget, s))
            other = next(within, shape)
            curve = losses.get(axis, [0.0] * (getattr(start, axis) + 1))
            grown.append((curve[getattr(shape, axis)] - curve[getattr(other, axis)], axis, other))
        won, axis, shape = max(grown, key=lambda step: step[0])
        if won <= 0:
            break
        rest.remove(axis)
    return shape


def _thinned(values: list[int]) -> list[int]:
    """Return at most `STEPS` of ascending values, evenly spaced, the first and last with them."""
    if len(values) <= STEPS:
        return values
    places = [round(i * (len(values) - 1) / (STEPS - 1)) for i in range(STEPS)]
    return [values[i] for i in places]
