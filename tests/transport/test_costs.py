"""Costs against materialised activations and weights; masses against their formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import duplicate
from torch import Tensor

from slimfuse.moments import Moments
from slimfuse.transport import (
    combine,
    correlation,
    masses,
    raw_cost,
    solve,
    standardised_cost,
    uniform,
    weight_cost,
)

SUMS = {"rtol": 0, "atol": 1e-12}  # float64 sums of at most 17 masses below 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streamed(x: Tensor, y: Tensor) -> Moments:
    moments = Moments(x=x.shape[1], y=y.shape[1])
    for a, b in zip(x.split(13), y.split(13), strict=True):
        moments.update(x=a, y=b)
    return moments


def test_the_standardised_cost_is_that_of_materialised_activations() -> None:
    x, y = 3 * normal(101, 7) + 5, normal(101, 5, seed=1) - 2
    y[:, :3] += x[:, :3]
    m = streamed(x, y)
    cost = standardised_cost(m.cov("x", "y"), m.cov("x").diagonal(), m.cov("y").diagonal())
    a, b = ((v - v.mean(0)) / v.std(0, correction=0) for v in (x, y))
    want = (a[:, :, None] - b[:, None, :]).square().mean(0)
    torch.testing.assert_close(cost, want, rtol=0, atol=1e-10)  # float64, means of 101 squares


def test_the_raw_cost_is_that_of_materialised_activations() -> None:
    x, y = 3 * normal(101, 7) + 5, normal(101, 5, seed=1) - 2
    m = streamed(x, y)
    cost = raw_cost(m.second("x", "y"), m.second("x").diagonal(), m.second("y").diagonal())
    want = (x[:, :, None] - y[:, None, :]).square().mean(0)
    torch.testing.assert_close(cost, want, rtol=1e-10, atol=0)  # float64, as above


def test_the_raw_cost_of_nearly_equal_units_is_never_negative() -> None:
    x = normal(101, 7) + 1e6  # squares of 1e12 round at 1e-4, their true distance is 1e-12
    y = x + 1e-6 * normal(101, 7, seed=1)
    m = streamed(x, y)
    second = m.second("x", "y"), m.second("x").diagonal(), m.second("y").diagonal()
    unclamped = second[1][:, None] + second[2][None, :] - 2 * second[0]
    assert float(unclamped.min()) < 0  # or this test is blind
    assert float(raw_cost(*second).min()) == 0


def test_a_unit_that_never_varies_correlates_with_nothing() -> None:
    x = normal(101, 7)
    x[:, 2] = 4.0
    m = streamed(x, x)
    rho = correlation(m.cov("x", "y"), m.cov("x").diagonal(), m.cov("y").diagonal())
    assert bool((rho[2] == 0).all()) and bool((rho[:, 2] == 0).all())
    torch.testing.assert_close(rho[0, 0], torch.tensor(1.0).double(), rtol=0, atol=1e-12)


def test_a_widened_unit_is_found_from_its_activations() -> None:
    x = normal(101, 7) @ normal(7, 7, seed=1)
    coupling = duplicate(7).plan[:, torch.randperm(14, generator=torch.Generator().manual_seed(0))]
    scale = masses(normal(14, seed=4).exp())[None, :] * 14  # copies of different size and offset
    y = (x @ (coupling > 0).double()) * scale + 3
    m = streamed(x, y)
    cost = standardised_cost(m.cov("x", "y"), m.cov("x").diagonal(), m.cov("y").diagonal())
    torch.testing.assert_close(solve(cost).plan, coupling, **SUMS)


def test_widened_weights_are_found_from_their_rows() -> None:
    rows = normal(7, 5)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    coupling = duplicate(7).plan[:, order]
    wide = (rows.T @ (coupling > 0).double()).T
    torch.testing.assert_close(solve(weight_cost(rows, wide)).plan, coupling, **SUMS)
    back = solve(weight_cost(wide, rows))
    torch.testing.assert_close(back.plan, coupling.T, **SUMS)
    assert back.cost == pytest.approx(0, abs=1e-12)


def test_the_weight_cost_is_the_squared_distance_of_rows() -> None:
    x, y = normal(7, 11), normal(5, 11, seed=1)
    want = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(weight_cost(x, y), want, rtol=1e-12, atol=0)  # float64
    cosine = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=2)
    scaled = weight_cost(3 * x, 0.1 * y, standardised=True)
    torch.testing.assert_close(scaled, 2 * (1 - cosine), rtol=0, atol=1e-12)
    found = weight_cost(x.float(), y.float())
    assert found.dtype == torch.float64
    assert float(weight_cost(x + 1e6, x + 1e6).min()) == 0  # clamped


def test_a_row_of_zero_weights_is_as_far_from_every_direction() -> None:
    rows = torch.cat([normal(3, 5), torch.zeros(1, 5, dtype=torch.float64)])
    cost = weight_cost(rows, normal(4, 5, seed=1), standardised=True)
    torch.testing.assert_close(cost[3], torch.ones(4, dtype=torch.float64), **SUMS)


def test_weight_costs_need_aligned_columns() -> None:
    with pytest.raises(ValueError, match="same aligned columns"):
        weight_cost(normal(3, 5), normal(3, 4))


def test_combined_costs_are_weighed_by_their_means() -> None:
    a, b = normal(7, 5).square(), 1000 * normal(7, 5, seed=1).square()
    want = 2 * a / a.mean() + 0.5 * b / b.mean()
    torch.testing.assert_close(combine([a, b], [2, 0.5]), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(combine([a]), a / a.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(combine([a, 0 * b]), combine([a]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("costs", "weights", "message"),
    [
        ([], None, "one shape"),
        ([torch.ones(2, 3), torch.ones(3, 2)], None, "one shape"),
        ([torch.ones(2, 3)], [1.0, 2.0], "a weight for each"),
        ([torch.ones(2, 3)], [-1.0], "at least 0"),
        ([torch.ones(2, 3)], [0.0], "at least 0"),
        ([torch.ones(2, 3)], [math.nan], "at least 0"),
    ],
)
def test_costs_that_cannot_be_combined(
    costs: list[Tensor], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        combine(costs, weights)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e30), min_size=1, max_size=17),
    power=st.floats(0, 20),
    floor=st.floats(1e-6, 1),
)
def test_masses_are_positive_and_sum_to_1(values: list[float], power: float, floor: float) -> None:
    found = masses(torch.tensor(values, dtype=torch.float64), power=power, floor=floor)
    assert bool((found > 0).all())
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    # raised values keep the sum within 1 + floor of the raw one
    assert float(found.min()) >= floor / (1 + floor) / len(values) * (1 - 1e-12)


def test_masses_follow_the_power_and_the_floor() -> None:
    values = torch.tensor([4.0, 1.0, 0.0, 3.0])
    torch.testing.assert_close(masses(values, power=0), uniform(4), **SUMS)
    squares = torch.tensor([16.0, 1.0, 0.0, 9.0]).double()
    squares[2] = 0.01 * 26 / 4  # the floor is relative to the mean
    want = squares / squares.sum()
    torch.testing.assert_close(masses(values, power=2, floor=0.01), want, **SUMS)
    torch.testing.assert_close(masses(1e-30 * values.double()), masses(values), **SUMS)
    torch.testing.assert_close(masses(torch.zeros(4)), uniform(4), **SUMS)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_masses_refuse_what_is_no_mass(bad: float) -> None:
    with pytest.raises(ValueError, match="value 1 of 3 is"):
        masses(torch.tensor([1.0, bad, 2.0]))


@pytest.mark.parametrize("wrong", [{"power": -1}, {"floor": 0}, {"power": math.inf}])
def test_masses_refuse_settings_without_meaning(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="power >= 0 and floor > 0"):
        masses(torch.ones(3), **wrong)
    with pytest.raises(ValueError, match="vector of values"):
        masses(torch.ones(3, 2))
