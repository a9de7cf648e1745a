"""Plans against scipy's assignment and a dense log-domain Sinkhorn; costs against activations."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import duplicate, permute
from torch import Tensor

from slimfuse.moments import Moments
from slimfuse.transport import (
    correlation,
    from_assignment,
    from_plan,
    raw_cost,
    solve,
    standardised_cost,
    uniform,
)

SOLVER = importlib.import_module("slimfuse.transport.solve")  # its function has the same name
SUMS = {"rtol": 0, "atol": 1e-12}  # float64 sums of at most 17 masses below 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(size: int, seed: int) -> Tensor:
    raw = normal(size, seed=seed).exp()
    return raw / raw.sum()


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_plan_of_equal_sizes_is_scipys_assignment(seed: int) -> None:
    cost = normal(17, 17, seed=seed).square()
    found = solve(cost)
    rows, columns = linear_sum_assignment(cost.numpy())
    want = torch.zeros(17, 17, dtype=torch.float64)
    want[rows, columns] = 1 / 17
    torch.testing.assert_close(found.plan, want, **SUMS)
    assert found.cost == pytest.approx(float(cost[rows, columns].mean()), rel=1e-12)
    assert found.converged


@pytest.mark.parametrize("reg", [None, 0.05, 1.0])
def test_the_plan_has_the_masses_that_were_asked_for(reg: float | None) -> None:
    mu, nu = masses(17, 1), masses(7, 2)
    found = solve(normal(17, 7).square(), mu, nu, reg=reg)
    # exact: float64 sums; entropic: the solver's own stopping tolerance 1e-9
    tolerance = 1e-12 if reg is None else 1e-8
    torch.testing.assert_close(found.plan.sum(1), mu, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.plan.sum(0), nu, rtol=0, atol=tolerance)
    assert found.marginal_error <= tolerance
    assert found.converged
    assert bool((found.plan >= 0).all())


def test_masses_default_to_uniform() -> None:
    found = solve(normal(17, 7).square())
    torch.testing.assert_close(found.plan.sum(1), uniform(17), **SUMS)
    torch.testing.assert_close(found.plan.sum(0), uniform(7), **SUMS)


def dense_sinkhorn(cost: Tensor, mu: Tensor, nu: Tensor, reg: float) -> Tensor:
    kernel = -cost / reg
    f, g = torch.zeros_like(mu), torch.zeros_like(nu)
    for _ in range(20_000):
        f = mu.log() - torch.logsumexp(kernel + g[None, :], 1)
        g = nu.log() - torch.logsumexp(kernel + f[:, None], 0)
    return (kernel + f[:, None] + g[None, :]).exp()


@pytest.mark.parametrize("reg", [0.1, 1.0])
def test_the_entropic_plan_is_the_log_domain_fixed_point(reg: float) -> None:
    cost, mu, nu = normal(7, 5).square(), masses(7, 1), masses(5, 2)
    want = dense_sinkhorn(cost, mu, nu, reg * float(cost.mean()))
    found = solve(cost, mu, nu, reg=reg)
    # the solver stops when a marginal is right to 1e-9; the plan is then right to about that
    torch.testing.assert_close(found.plan, want, rtol=1e-6, atol=1e-8)


def test_reg_counts_in_units_of_the_mean_cost() -> None:
    cost = normal(7, 5).square()
    once, scaled = solve(cost, reg=0.3), solve(1000 * cost, reg=0.3)
    torch.testing.assert_close(once.plan, scaled.plan, rtol=0, atol=1e-9)  # stopping tolerance


def test_a_plan_that_missed_its_tolerance_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOLVER, "SINKHORN_ITERATIONS", 1)
    found = solve(normal(17, 7).square(), masses(17, 1), masses(7, 2), reg=0.01)
    assert not found.converged
    assert found.marginal_error > 1e-6


def test_an_exact_plan_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOLVER, "EMD_ITERATIONS", 1)
    assert not solve(normal(17, 17).square()).converged


def test_effective_units_are_1_for_a_permutation_and_n_for_the_independent_coupling() -> None:
    assert permute(17, 3).effective_units == pytest.approx(1, rel=1e-12)  # float64, exact identity
    independent = from_plan(torch.outer(uniform(17), masses(7, 1)))
    assert independent.effective_units == pytest.approx(17, rel=1e-12)
    half = from_plan(duplicate(5, 3).plan.T)  # three sources in every target
    assert half.effective_units == pytest.approx(3, rel=1e-12)


def test_entropy_is_1_for_the_independent_coupling_of_any_masses_and_halved_when_hard() -> None:
    assert from_plan(torch.outer(masses(17, 1), masses(7, 2))).entropy == pytest.approx(1)
    # log 17 of the independent coupling's 2 log 17
    assert permute(17, 3).entropy == pytest.approx(math.log(17) / (2 * math.log(17)))


@pytest.mark.parametrize("reg", [None, 0.2])
def test_columns_of_push_and_rows_of_pull_sum_to_1(reg: float | None) -> None:
    found = solve(normal(17, 7).square(), masses(17, 1), masses(7, 2), reg=reg)
    # the entropic plan's sums carry its marginal error (1e-9) over the smallest mass (0.01)
    tolerance = 1e-12 if reg is None else 1e-6
    torch.testing.assert_close(found.push.sum(0), torch.ones(7).double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(found.pull.sum(1), torch.ones(17).double(), rtol=0, atol=tolerance)


def test_an_assignment_leaves_a_target_nobody_chose_at_zero() -> None:
    found = from_assignment(torch.tensor([2, 0, 2, 3, 0]), 5)
    want = torch.zeros(5, 5, dtype=torch.float64)
    want[[1, 4], 0], want[[0, 2], 2], want[3, 3] = 0.5, 0.5, 1.0
    torch.testing.assert_close(found.push, want, **SUMS)
    torch.testing.assert_close(found.pull, (want > 0).double(), **SUMS)


def test_a_source_without_mass_is_read_from_nothing() -> None:
    mu = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    found = solve(normal(3, 2).square(), mu)
    assert bool(torch.isfinite(found.pull).all())
    assert float(found.pull[1].abs().sum()) == 0


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
    scale = masses(14, 4)[None, :] * 14  # copies of different size and offset
    y = (x @ (coupling > 0).double()) * scale + 3
    m = streamed(x, y)
    cost = standardised_cost(m.cov("x", "y"), m.cov("x").diagonal(), m.cov("y").diagonal())
    torch.testing.assert_close(solve(cost).plan, coupling, **SUMS)
