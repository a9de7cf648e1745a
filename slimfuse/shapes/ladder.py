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


def changed(base: Shape, axis: str, value: int, *, follow: bool = False) -> Shape:
    """Return a shape with another value; follow: the MLP keeps its ratio to a changed width."""
    shape = replace(base, **{axis: value})
    if follow and axis == "hidden_size":
        inner = base.intermediate_size * value // base.hidden_size
        shape = replace(shape, intermediate_size=inner)
    return shape


def grid(axis: str, base: Shape, meter: Meter, *, follow: bool = False) -> list[int]:
    """Return the sensible legal values of one axis, ascending, the other axes as in `base`.

    follow: the MLP's width steps with the stream's, see `changed`.

    hidden_size: multiples of 8 where they leave at least 8 values; intermediate_size: of 16
    where they leave at least 64, else of 8 where they leave 8; otherwise every value. The
    parent's own size and, below the first multiple, every legal value belong to it too.
    """
    top = getattr(meter.top, axis)

    def legal(values: range) -> list[int]:
        tried = {v: changed(base, axis, v, follow=follow) for v in values}
        return [v for v, shape in tried.items() if meter.why_illegal(shape) is None]

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
    Heads that are free with hidden_size keep the parent's head size: both fall together. So does
    an MLP that is free with it, where the class ties their widths.
    """
    heads_fall = {"hidden_size", "num_attention_heads"} <= set(free)
    follow = meter.tied and {"hidden_size", "intermediate_size"} <= set(free)
    falling = ["num_attention_heads"] * heads_fall + ["intermediate_size"] * follow
    dials: list[list[tuple[Fraction, dict[str, int]]]] = []
    for axis in free:
        if axis in falling:
            continue
        if axis == "hidden_size" and heads_fall:
            units = meter.family.head_dims(meter.config)
            shapes = [
                changed(replace(start, num_attention_heads=h), axis, h * units, follow=follow)
                for h in range(meter.top.num_attention_heads, 0, -1)
            ]
            shapes = [shape for shape in shapes if meter.why_illegal(shape) is None]
        else:
            values = reversed(grid(axis, start, meter, follow=follow))
            shapes = [changed(start, axis, value, follow=follow) for value in values]
        axes = [axis, *falling] if axis == "hidden_size" else [axis]
        top = getattr(meter.top, axis)
        settings = [
            (Fraction(getattr(shape, axis), top), {a: getattr(shape, a) for a in axes})
            for shape in shapes
        ]
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
