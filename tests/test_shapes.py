"""The shape planner: only legal shapes, the largest within a budget, and reasons."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfuse.errors import ShapeError
from slimfuse.families import Shape, ViT
from slimfuse.shapes import (
    AXES,
    HEADER,
    Budget,
    Meter,
    Wish,
    grid,
    ladder,
    largest,
    resolve,
)

WIDTH, HEADS, MLP, DEPTH = AXES


def parent(width: int = 32, heads: int = 4, mlp: int = 72, depth: int = 3) -> Any:
    return tiny.vit_config(
        hidden_size=width, num_attention_heads=heads, intermediate_size=mlp,
        num_hidden_layers=depth,
    )  # fmt: skip


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


def weights(config: Any) -> int:
    """Return the parameters of a ViT by the formula, for an independent count."""
    d, m = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    block = 4 * (d * d + d) + 2 * d * m + m + d + 4 * d
    embed = d + (patches + 1) * d + config.num_channels * config.patch_size**2 * d + d
    head = 2 * d + d * config.num_labels + config.num_labels
    return int(embed + config.num_hidden_layers * block + head)


COUNTS: dict[str, Callable[[Any], int]] = {"params": weights, "flops": ViT().flops}


def count(kind: str, config: Any, shape: Shape) -> int:
    return COUNTS[kind](ViT().narrow(config, shape))


# ---- without a budget ------------------------------------------------------------------------


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


@settings(max_examples=60, deadline=None)
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


# ---- the ladder ------------------------------------------------------------------------------


def nearest(values: Sequence[int], goal: Fraction) -> int:
    return min(values, key=lambda v: (abs(v - goal), -v))


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


# ---- counted budgets -------------------------------------------------------------------------


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


# ---- measured latency ------------------------------------------------------------------------


class Timer:
    """A stopwatch that answers from a formula of the FLOPs' ratio, and counts."""

    def __init__(self, config: Any, formula: Callable[[float], float]) -> None:
        self.whole, self.formula, self.calls = ViT().flops(config), formula, 0

    def __call__(self, config: Any) -> float:
        self.calls += 1
        return self.formula(ViT().flops(config) / self.whole)


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


# ---- reasons ---------------------------------------------------------------------------------


def test_an_illegal_number_is_refused_with_what_would_do() -> None:
    with pytest.raises(ShapeError) as caught:
        resolve(Wish(18), parent(), ViT())
    error = caught.value
    assert error.where == "target.hidden_size"
    assert "18" in str(error.got) and str(error.allowed) == "hidden_size 16 or 20"
    assert error.hint == "or num_attention_heads 2 or 3 with hidden_size 18"


@pytest.mark.parametrize(
    ("wish", "where", "allowed"),
    [
        (Wish(40), "target.hidden_size", "1 … 32"),
        (Wish(0.5, 5), "target.num_attention_heads", "1 … 4"),
        (Wish(intermediate_size=73), "target.intermediate_size", "1 … 72"),
        (Wish(num_hidden_layers=4), "target.num_hidden_layers", "1 … 3"),
    ],
)
def test_larger_than_the_parent_is_refused(wish: Wish, where: str, allowed: str) -> None:
    with pytest.raises(ShapeError) as caught:
        resolve(wish, parent(), ViT())
    assert caught.value.where == where and caught.value.allowed == allowed


@pytest.mark.parametrize("value", [0, -3, 0.0, 1.5, float("nan"), True, "half"])
def test_values_out_of_range(value: Any) -> None:
    with pytest.raises(ShapeError, match="out of range") as caught:
        Wish(value)
    assert caught.value.where == "target.hidden_size" and caught.value.got is value
    with pytest.raises(ShapeError, match="out of range"):
        Budget("params", value)


def test_malformed_budgets() -> None:
    with pytest.raises(ShapeError, match="out of range") as caught:
        Budget("latency_ratio", 3)
    assert caught.value.allowed == "a ratio in (0, 1]"
    with pytest.raises(ShapeError, match="no such budget"):
        Budget("joules", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="no such size"):
        Wish(free=("width",))
    with pytest.raises(ShapeError, match="nothing to shrink") as caught:
        Wish(8, intermediate_size=0.5, budget=Budget("params", 0.5))
    assert caught.value.got == "hidden_size 8; intermediate_size 0.5"


@pytest.mark.parametrize("kind", ["params", "flops", "latency_ratio"])
def test_an_unreachable_budget_says_what_is_reachable(kind: Any) -> None:
    config = parent()
    timer = Timer(config, lambda r: 0.1 + 0.9 * r)
    with pytest.raises(ShapeError) as caught:
        resolve(Wish(16, budget=Budget(kind, 0.001)), config, ViT(), time_ratio=timer)
    error = caught.value
    assert error.where == f"target.budget.{kind}"
    assert "16 wide, 3 deep, 4 heads, MLP 1" in error.what
    assert "up to 0.001 of the parent's" in str(error.got)
    assert str(error.allowed).startswith("from ")
    assert "leave out hidden_size" in str(error.hint) and "num_hidden_layers" in str(error.hint)
    if kind != "latency_ratio":
        least = count(kind, config, Shape(16, 4, 1, 3))
        assert f"{least:,}" in str(error.allowed)


def test_refusals_name_the_key_what_was_got_and_what_may_be() -> None:
    rounding = resolve(Wish(0.55), parent(), ViT()).refused[0]  # 17.6 units, 18 by rounding
    assert rounding.shape.hidden_size == 18 and rounding.key == "hidden_size"
    assert "got hidden_size 18, num_attention_heads 4" in rounding.reason
    assert "allowed hidden_size 16 or 20" in rounding.reason
    config = parent(64, 4, 256, 2)
    over = resolve(Wish(budget=Budget("params", 0.5)), config, ViT()).refused
    assert over
    for refusal in over:
        used, limit = weights(ViT().narrow(config, refusal.shape)), int(weights(config) / 2)
        assert refusal.reason == f"params: over the budget; got {used:,}, allowed up to {limit:,}"
    heads = resolve(Wish(0.5, 2), parent(), ViT()).refused  # 16 units: three heads won't do
    assert [r.shape.num_attention_heads for r in heads] == [3]


def test_rows_fill_a_table() -> None:
    got = resolve(Wish(budget=Budget("flops", 0.5)), parent(64, 4, 256, 2), ViT())
    rows = got.rows()
    assert {len(row) for row in rows} == {len(HEADER)}
    assert rows[0][:2] == ("chosen", str(got.shape))
    assert [row[0] for row in rows].count("possible") == len(got.alternatives) > 0
    assert rows[-1][-1] == got.refused[-1].reason
