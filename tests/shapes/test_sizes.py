"""Shapes without a budget, and the ladder: only legal ones, one share at a time."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes.legal import DEPTH, HEADS, MLP, WIDTH, count, nearest, parent

from slimfuse.errors import ShapeError
from slimfuse.families import Shape, ViT
from slimfuse.shapes import (
    AXES,
    Budget,
    Meter,
    Wish,
    grid,
    ladder,
    resolve,
)


def test_nothing_asked_is_the_parent_itself() -> None:
    config = parent()
    got = resolve(Wish(), config, ViT())
    assert got.shape == ViT().shape(config)
    assert got.chosen.params_ratio == got.chosen.flops_ratio == got.chosen.latency_ratio == 1


def test_numbers_ratios_and_defaults() -> None:
    got = resolve(Wish(0.5, num_hidden_layers=0.67), parent(), ViT())
    # half of 32; MLP in proportion; as many heads, smaller; 2.01 layers are 2
    assert got.shape == Shape(16, 4, 36, 2)
    assert got.config.hidden_size == 16 and got.config.num_hidden_layers == 2
    assert any("num_hidden_layers: 0.67 of the parent's 3 is 2.01" in n for n in got.notes)
    assert any("in proportion to hidden_size (16 of 32): 36 of 72" in n for n in got.notes)
    assert any("the parent's 4, with 4 units each instead of 8" in n for n in got.notes)
    exact = resolve(Wish(20, 2, 11, 3), parent(), ViT())
    assert exact.shape == Shape(20, 2, 11, 3) and exact.notes == ()


@pytest.mark.parametrize(
    ("wish", "shape"),
    [
        (Wish(0.4), Shape(12, 4, 27, 3)),  # 12.8 units; multiples of 4
        (Wish(0.01), Shape(8, 4, 18, 3)),  # two units a head at least
        (Wish(0.55, 0.75), Shape(18, 3, 41, 3)),  # 3 heads; 17.6 units; MLP 40.5, a tie goes up
        (Wish(18, 0.75), Shape(18, 3, 41, 3)),
        (Wish(16, 0.75), Shape(16, 4, 36, 3)),  # 3 don't divide 16: 2 or 4, a tie goes up
        (Wish(num_attention_heads=3), Shape(30, 3, 68, 3)),  # the width that wasn't asked for
        (Wish(intermediate_size=0.1), Shape(32, 4, 7, 3)),
        (Wish(num_hidden_layers=0.5), Shape(32, 4, 72, 2)),  # 1.5
    ],
)
def test_ratios_go_to_the_nearest_legal_value(wish: Wish, shape: Shape) -> None:
    assert resolve(wish, parent(), ViT()).shape == shape


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_is_proposed_is_legal(data: st.DataObject) -> None:
    draw = data.draw
    heads = draw(st.integers(1, 6))
    config = parent(
        heads * draw(st.integers(2, 9)), heads, draw(st.integers(1, 70)), draw(st.integers(1, 4))
    )
    family = ViT()
    top = family.shape(config)

    def asked(axis: str) -> Any:
        size = getattr(top, axis)
        return draw(
            st.none() | st.integers(1, size + 2) | st.floats(0, 1, exclude_min=True), label=axis
        )

    budget = draw(
        st.none()
        | st.builds(
            Budget, st.sampled_from(["params", "flops"]), st.floats(0.01, 1) | st.integers(1, 9999)
        )
        | st.builds(Budget, st.just("latency_ratio"), st.floats(0.01, 1))
    )
    free = tuple(draw(st.sets(st.sampled_from(AXES), min_size=1)))

    def time_ratio(narrow: Any) -> float:
        return family.flops(narrow) / family.flops(config)

    try:
        wish = Wish(*(asked(a) for a in AXES), budget=budget, free=free)
        got = resolve(wish, config, family, time_ratio=time_ratio)
    except ShapeError as error:
        assert error.where is not None and error.where.startswith("target.")
        assert error.got is not None and error.allowed is not None
        return
    assert family.shape(got.config) == got.shape
    for shape in (got.shape, *(o.shape for o in got.alternatives)):
        assert family.shape(family.narrow(config, shape)) == shape
        if budget is not None:
            kind = "flops" if budget.kind == "latency_ratio" else budget.kind
            used = count(kind, config, shape)
            limit = budget.value
            assert used <= (
                limit if isinstance(limit, int) else limit * count(kind, config, top) * (1 + 1e-12)
            )
    for axis in AXES:
        if isinstance(wish.given(axis), int):
            assert getattr(got.shape, axis) == wish.given(axis)
    meter = Meter(config, family)
    for refusal in got.refused:
        assert refusal.shape not in {o.shape for o in (got.chosen, *got.alternatives)}
        illegal = meter.why_illegal(refusal.shape) is not None
        assert illegal == (refusal.why != "over the budget")


@pytest.mark.parametrize("free", [(WIDTH, MLP), (WIDTH, MLP, DEPTH), (DEPTH, MLP), (HEADS,)])
def test_the_ladder_is_every_shape_of_one_share(free: tuple[str, ...]) -> None:
    config, family = parent(32, 4, 40, 3), ViT()
    meter = Meter(config, family)
    top = meter.top
    rungs = ladder(top, free, meter)
    grids = {axis: grid(axis, top, meter) for axis in free}
    # between any two shares at which an axis steps: those are multiples of 1/960
    shares = [Fraction(2 * k + 1, 2 * 1920) for k in reversed(range(1920))]
    brute = [
        replace(top, **{a: nearest(grids[a], r * getattr(top, a)) for a in free}) for r in shares
    ]
    # axes that step down at one share do so one after the other, between those shapes
    assert [s for s in rungs if s in set(brute)] == list(dict.fromkeys(brute))
    for upper, lower in pairwise(rungs):
        assert all(getattr(lower, a) <= getattr(upper, a) for a in AXES)
        assert sum(getattr(lower, a) < getattr(upper, a) for a in AXES) == 1


def test_at_one_share_the_finest_step_comes_first() -> None:
    meter = Meter(parent(15, 3, 11, 3), ViT())
    rungs = ladder(meter.top, (WIDTH, DEPTH), meter)
    # width steps down at 0.9, 0.7 and 0.5, depth at 5/6 and 0.5
    assert [(s.hidden_size, s.num_hidden_layers) for s in rungs] == [
        (15, 3), (12, 3), (12, 2), (9, 2), (6, 2), (6, 1),
    ]  # fmt: skip


def test_heads_that_shrink_with_the_width_keep_their_size() -> None:
    meter = Meter(parent(), ViT())
    rungs = ladder(meter.top, (WIDTH, HEADS), meter)
    assert [(s.hidden_size, s.num_attention_heads) for s in rungs] == [
        (32, 4), (24, 3), (16, 2), (8, 1),
    ]  # fmt: skip
    alone = ladder(meter.top, (HEADS,), meter)
    assert [s.num_attention_heads for s in alone] == [4, 2, 1]  # three don't divide 32


def test_the_grid_prefers_round_sizes_where_there_are_enough() -> None:
    meter = Meter(parent(192, 4, 1100, 1), ViT())
    assert grid(WIDTH, meter.top, meter) == [*range(8, 193, 8)]
    assert grid(MLP, meter.top, meter) == [*range(1, 16), *range(16, 1100, 16), 1100]
    small = Meter(parent(15, 3, 17, 1), ViT())
    assert grid(WIDTH, small.top, small) == [6, 9, 12, 15]
    assert grid(MLP, small.top, small) == [*range(1, 18)]
    middle = Meter(parent(96, 3, 100, 1), ViT())  # multiples of 24 would be only four
    assert grid(WIDTH, middle.top, middle) == [*range(6, 97, 3)]
    assert grid(MLP, middle.top, middle) == [*range(1, 8), *range(8, 97, 8), 100]
