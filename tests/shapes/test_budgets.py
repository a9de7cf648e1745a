"""Shapes within a budget: the largest legal one, by counts or by measured latency."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from shapes.legal import DEPTH, HEADS, MLP, WIDTH, Timer, count, nearest, parent, weights

from slimfuse.errors import ShapeError
from slimfuse.families import Shape, ViT
from slimfuse.shapes import (
    Budget,
    Meter,
    Wish,
    grid,
    ladder,
    largest,
    resolve,
)


def legal_shapes(config: Any, free: tuple[str, ...]) -> list[Shape]:
    """Return every legal shape that differs from the parent on `free`, by asking the family."""
    top = ViT().shape(config)
    found = []
    for sizes in product(*(range(1, getattr(top, a) + 1) for a in free)):
        shape = replace(top, **dict(zip(free, sizes, strict=True)))
        try:
            ViT().narrow(config, shape)
        except ShapeError:
            continue
        found.append(shape)
    return found


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("axis", [WIDTH, MLP, DEPTH])
def test_one_free_axis_is_the_largest_of_all_legal_shapes(kind: Any, axis: str) -> None:
    config, family = parent(15, 3, 11, 3), ViT()  # small: every legal value is on the grid
    line = legal_shapes(config, (axis,))
    assert len(line) >= 3
    costs = sorted({count(kind, config, s) for s in line})
    for value in [*costs, *(c + 1 for c in costs), *(c - 1 for c in costs[1:])]:
        got = resolve(Wish(budget=Budget(kind, value), free=(axis,)), config, family).shape
        fitting = [s for s in line if count(kind, config, s) <= value]
        assert got == max(fitting, key=lambda s: getattr(s, axis))


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("free", [(WIDTH, MLP), (WIDTH, MLP, DEPTH)])
def test_proportions_and_no_larger_shape_within_the_budget(
    kind: Any, free: tuple[str, ...]
) -> None:
    config, family = parent(18, 3, 28, 3), ViT()  # no two axes step at one share
    top = family.shape(config)
    every = legal_shapes(config, free)
    costs = {s: count(kind, config, s) for s in every}
    meter = Meter(config, family)
    shares = [Fraction(2 * k + 1, 3360) for k in reversed(range(1680))]
    scaled = {}
    for a in free:
        values = grid(a, top, meter)
        scaled[a] = [nearest(values, r * getattr(top, a)) for r in shares]
    for percent in range(17, 100, 9):
        wish = Wish(budget=Budget(kind, percent / 100), free=free)
        got = resolve(wish, config, family).shape
        limit = percent / 100 * costs[top]
        assert costs[got] <= limit
        # the rule from its words: the largest share; then without depth; then without width
        shape = top
        rest = [a for a in (DEPTH, WIDTH, MLP) if a in free]
        while rest:
            line = [
                replace(shape, **dict(zip(rest, values, strict=True)))
                for values in dict.fromkeys(zip(*(scaled[a] for a in rest), strict=True))
            ]
            shape = next(s for s in line if costs[s] <= limit)
            rest.pop(0)
        assert got == shape
        # independent of the rule: every legal shape that is larger is over the budget
        for s in every:
            if s != got and all(getattr(s, a) >= getattr(got, a) for a in free):
                assert costs[s] > limit
        # and the budget is used: what is left is less than one unit of every MLP costs
        assert got.intermediate_size == 28 or limit - costs[got] < (
            costs[replace(got, intermediate_size=got.intermediate_size + 1)] - costs[got]
        )


def test_absolute_and_relative_budgets_agree_and_what_is_exactly_met_is_met() -> None:
    config, family = parent(64, 4, 256, 2), ViT()
    whole = weights(config)
    goal = weights(family.narrow(config, Shape(40, 4, 160, 2)))
    for value in (goal, goal / whole):
        got = resolve(Wish(budget=Budget("params", value)), config, family)
        assert got.shape == Shape(40, 4, 160, 2)
        assert got.chosen.params == goal
    less = resolve(Wish(budget=Budget("params", goal - 1)), config, family)
    assert less.chosen.params < goal


def test_fixed_sizes_stay_and_the_free_ones_give() -> None:
    config = parent(64, 4, 256, 2)
    got = resolve(Wish(0.5, budget=Budget("params", 0.3)), config, ViT())
    assert got.shape == Shape(32, 4, got.shape.intermediate_size, 2)
    assert got.shape.intermediate_size > 128  # not tied to the width: the budget decides
    assert got.chosen.params_ratio <= 0.3
    heads = resolve(
        Wish(budget=Budget("flops", 0.4), free=(WIDTH, HEADS, MLP)), config, ViT()
    ).shape
    assert heads.hidden_size == 16 * heads.num_attention_heads  # heads keep their 16 units
    enough = resolve(Wish(0.5, budget=Budget("params", 0.9)), config, ViT())
    assert enough.shape == Shape(32, 4, 256, 2)
    assert "nothing had to shrink" in enough.notes[0]


def test_counting_weights_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    got = resolve(Wish(0.5), parent(), ViT())
    assert got.chosen.params == weights(got.config)
    assert torch.equal(before, torch.get_rng_state())


NOISE = random.Random(0)
FORMULAS = {
    "monotone": lambda r: 0.1 + 0.9 * r,
    "plateau": lambda r: max(0.2, math.ceil(r * 4) / 4),
    "noise": lambda r: (0.1 + 0.9 * r) * NOISE.uniform(0.9, 1.1),
}


@pytest.mark.parametrize("shape", list(FORMULAS))
@pytest.mark.parametrize("value", [0.25, 0.5, 0.8, 1.0])
def test_latency_by_bisection(shape: str, value: float) -> None:
    config, family = parent(64, 4, 256, 2), ViT()
    timer = Timer(config, FORMULAS[shape])
    budget = Budget("latency_ratio", value)
    got = resolve(Wish(budget=budget), config, family, time_ratio=timer)
    meter = Meter(config, family)
    rungs = ladder(meter.top, (WIDTH, MLP), meter)
    assert len(got.measured) == timer.calls <= 2 + math.log2(len(rungs))
    ratios = dict(got.measured)
    if value == 1.0:
        assert got.shape == meter.top and timer.calls == 0
        return
    # whatever the noise: the choice was measured to meet, the rung above it to miss
    assert ratios[got.shape] <= value < ratios[rungs[rungs.index(got.shape) - 1]]
    assert got.chosen.latency_ratio == ratios[got.shape]
    assert all(o.latency_ratio is not None and o.latency_ratio <= value for o in got.alternatives)
    assert all(ratios[r.shape] > value for r in got.refused)
    if shape != "noise":
        whole = family.flops(config)
        linear = next(
            s for s in rungs
            if FORMULAS[shape](family.flops(family.narrow(config, s)) / whole) <= value
        )  # fmt: skip
        assert got.shape == linear


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 100])
def test_bisection_finds_every_border(n: int) -> None:
    config = parent(12, 2, 100, 1)
    rungs = [Shape(10, 2, m, 1) for m in range(n, 0, -1)]
    for border in range(n + 1):  # the widest MLP that is fast enough; 0: none
        calls = []

        def time_ratio(narrow: Any, border: int = border, calls: list[int] = calls) -> float:
            calls.append(narrow.intermediate_size)
            return 0.4 if narrow.intermediate_size <= border else 0.6

        found = largest(rungs, Budget("latency_ratio", 0.5), Meter(config, ViT(), time_ratio))
        assert found == (n - border if border else None)
        assert len(calls) == len(set(calls)) <= math.ceil(math.log2(n + 1))


def test_a_latency_budget_needs_a_stopwatch() -> None:
    with pytest.raises(ValueError, match="time_ratio"):
        resolve(Wish(budget=Budget("latency_ratio", 0.5)), parent(), ViT())
