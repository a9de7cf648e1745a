"""The ladder of legal shapes that a budget climbs down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from slimfuse.families import Shape
from slimfuse.shapes.budget import Meter

# (step, the legal values it must leave): round sizes make fast kernels, but small parents need
# every value there is
STEPS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "hidden_size": ((8, 8), (1, 0)),
    "intermediate_size": ((16, 64), (8, 8), (1, 0)),
}
EVERY = ((1, 0),)


def grid(axis: str, base: Shape, meter: Meter) -> list[int]:
    """Return the sensible legal values of one axis, ascending, the other axes as in `base`.

    hidden_size: multiples of 8 where they leave at least 8 values; intermediate_size: of 16
    where they leave at least 64, else of 8 where they leave 8; otherwise every value. The
    parent's own size and, below the first multiple, every legal value belong to it too.
    """
    top = getattr(meter.top, axis)

    def legal(values: range) -> list[int]:
        return [v for v in values if meter.why_illegal(replace(base, **{axis: v})) is None]

    for step, enough in STEPS.get(axis, EVERY):
        values = legal(range(step, top + 1, step))
        if len(values) >= enough:
            break
    if not values:
        return []
    return sorted({*legal(range(1, values[0])), *values, *legal(range(top, top + 1))})


def ladder(start: Shape, free: tuple[str, ...], meter: Meter) -> list[Shape]:
    """Return the shapes that keep the parent's proportions on the free axes, largest first.

    For a share r of the parent's sizes, each free axis takes the value of its grid that is
    nearest to r × the parent's; the ladder is every shape met as r falls from 1 to 0, and where
    several axes step down at one r, the finest step comes first. No axis ever grows on the way
    down, so neither do parameters and FLOPs.
    Heads that are free with hidden_size keep the parent's head size: both fall together.
    """
    together = {"hidden_size", "num_attention_heads"} <= set(free)
    dials: list[list[tuple[Fraction, dict[str, int]]]] = []
    for axis in free:
        if together and axis == "num_attention_heads":
            continue
        if together and axis == "hidden_size":
            units = meter.family.head_dims(meter.config)
            heads = meter.top.num_attention_heads
            settings = [
                (Fraction(h, heads), {"hidden_size": h * units, "num_attention_heads": h})
                for h in range(heads, 0, -1)
                if meter.why_illegal(
                    replace(start, hidden_size=h * units, num_attention_heads=h)
                ) is None
            ]  # fmt: skip
        else:
            top = getattr(meter.top, axis)
            settings = [(Fraction(v, top), {axis: v}) for v in reversed(grid(axis, start, meter))]
        if settings:
            dials.append(settings)
    turns = [
        ((upper[0] + lower[0]) / 2, upper[0] - lower[0], lower[1])
        for settings in dials
        for upper, lower in pairwise(settings)
    ]
    shape = start
    for settings in dials:
        shape = replace(shape, **settings[0][1])
    rungs = [shape]
    for _, _, change in sorted(turns, key=lambda turn: (-turn[0], turn[1])):
        shape = replace(shape, **change)
        rungs.append(shape)
    return [rung for rung in rungs if meter.why_illegal(rung) is None]
