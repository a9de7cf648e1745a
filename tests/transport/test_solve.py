"""Balanced plans against scipy's assignment, POT itself and a dense log-domain Sinkhorn."""

from __future__ import annotations

import math

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from tiny import duplicate, permute
from torch import Tensor

from slimfuse.transport import (
    Solver,
    TransportMap,
    entropic,
    exact,
    from_assignment,
    from_plan,
    solve,
    uniform,
    weight_cost,
)

SUMS = {"rtol": 0, "atol": 1e-12}  # float64 sums of at most 17 masses below 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(size: int, seed: int) -> Tensor:
    raw = normal(size, seed=seed).exp()
    return raw / raw.sum()


def soft(reg: float | None) -> Solver:
    return Solver() if reg is None else Solver("sinkhorn", reg=reg)


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
    mu, nu = weights(17, 1), weights(7, 2)
    found = solve(normal(17, 7).square(), mu, nu, soft(reg))
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
    for _ in range(2_000):
        f = mu.log() - torch.logsumexp(kernel + g[None, :], 1)
        g = nu.log() - torch.logsumexp(kernel + f[:, None], 0)
    return (kernel + f[:, None] + g[None, :]).exp()


@pytest.mark.parametrize("reg", [0.1, 1.0])
def test_the_entropic_plan_is_the_log_domain_fixed_point(reg: float) -> None:
    cost, mu, nu = normal(7, 5).square(), weights(7, 1), weights(5, 2)
    want = dense_sinkhorn(cost, mu, nu, reg * float(cost.mean()))
    found = solve(cost, mu, nu, soft(reg))
    # the solver stops when a marginal is right to 1e-9; the plan is then right to about that
    torch.testing.assert_close(found.plan, want, rtol=1e-6, atol=1e-8)


def test_reg_counts_in_units_of_the_mean_cost() -> None:
    cost = normal(7, 5).square()
    once, scaled = solve(cost, solver=soft(0.3)), solve(1000 * cost, solver=soft(0.3))
    torch.testing.assert_close(once.plan, scaled.plan, rtol=0, atol=1e-9)  # stopping tolerance


def test_a_plan_that_missed_its_tolerance_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropic, "ITERATIONS", 1)
    monkeypatch.setattr(entropic, "STEP", math.inf)  # no warming up at larger regularisers
    found = solve(normal(17, 7).square(), weights(17, 1), weights(7, 2), soft(0.01))
    assert not found.converged
    assert found.marginal_error > 1e-6


def test_an_exact_plan_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "EMD_ITERATIONS", 1)
    assert not solve(normal(17, 15).square()).converged


def test_effective_units_are_1_for_a_permutation_and_n_for_the_independent_coupling() -> None:
    assert permute(17, 3).effective_units == pytest.approx(1, rel=1e-12)  # float64, exact identity
    independent = from_plan(torch.outer(uniform(17), weights(7, 1)))
    assert independent.effective_units == pytest.approx(17, rel=1e-12)
    half = from_plan(duplicate(5, 3).plan.T)  # three sources in every target
    assert half.effective_units == pytest.approx(3, rel=1e-12)


def test_entropy_is_1_for_the_independent_coupling_of_any_masses_and_halved_when_hard() -> None:
    assert from_plan(torch.outer(weights(17, 1), weights(7, 2))).entropy == pytest.approx(1)
    # log 17 of the independent coupling's 2 log 17
    assert permute(17, 3).entropy == pytest.approx(math.log(17) / (2 * math.log(17)))


@pytest.mark.parametrize("reg", [None, 0.2])
def test_columns_of_push_and_rows_of_pull_sum_to_1(reg: float | None) -> None:
    found = solve(normal(17, 7).square(), weights(17, 1), weights(7, 2), soft(reg))
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


def test_columns_without_mass_do_not_count_as_effective_units() -> None:
    plan = torch.zeros(4, 3, dtype=torch.float64)
    plan[:2, 0], plan[2, 1] = 0.25, 0.25
    assert from_plan(plan).effective_units == pytest.approx(1.5, rel=1e-12)
    assert from_plan(0 * plan).effective_units == 0


def test_the_entropy_of_a_plan_does_not_depend_on_how_much_it_moves() -> None:
    plan = solve(normal(7, 5).square(), solver=soft(0.3)).plan
    whole, part = from_plan(plan).entropy, from_plan(0.3 * plan).entropy
    assert part == pytest.approx(whole, rel=1e-12)  # float64, exact identity


SIZES = st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(0, 999))
KINDS = {
    "emd": Solver(),
    "sinkhorn": Solver("sinkhorn", reg=0.2),
    "unbalanced": Solver("unbalanced", reg=0.2, marginal_reg=0.5),
    "partial": Solver("partial", mass=0.6),
    "soft partial": Solver("partial", reg=0.2, mass=0.6),
}


def same(found: TransportMap, want: Tensor, atol: float = 1e-8) -> None:
    """The solvers stop at 1e-9; masses are of the order of 0.1."""
    torch.testing.assert_close(found.plan, want, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(sizes=SIZES)
def test_sides_of_any_plan_sum_to_1_and_units_without_mass_stay_out(
    kind: str, sizes: tuple[int, int, int]
) -> None:
    n, m, seed = sizes
    mu, nu = weights(n, seed), weights(m, seed + 1)
    mu, nu = torch.cat([mu, mu.new_zeros(1)]), torch.cat([nu.new_zeros(2), nu])
    found = solve(normal(n + 1, m + 2, seed=seed).square(), mu, nu, KINDS[kind])
    assert found.converged
    assert bool((found.plan >= 0).all())
    for side, axis, mass in ((found.push, 0, found.nu), (found.pull, 1, found.mu)):
        sums = side.sum(axis)
        # the balanced entropic plan's marginal error (1e-9) over the smallest mass (1e-3)
        torch.testing.assert_close(sums, (mass > 0).double(), rtol=0, atol=1e-5)
    assert float(found.plan[-1].sum()) == 0 and float(found.plan[:, :2].sum()) == 0
    assert 0 <= found.entropy <= 1 + 1e-9
    assert 1 - 1e-9 <= found.effective_units <= n + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_units_in_another_order_give_the_plan_in_that_order(kind: str) -> None:
    cost, mu, nu = normal(11, 7).square(), weights(11, 1), weights(7, 2)
    rows, columns = torch.randperm(11), torch.randperm(7)
    found = solve(cost[rows][:, columns], mu[rows], nu[columns], KINDS[kind])
    same(found, solve(cost, mu, nu, KINDS[kind]).plan[rows][:, columns])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_comes_back_as_the_float64_plan(kind: str) -> None:
    cost, mu, nu = normal(11, 7).square().float(), weights(11, 1).float(), weights(7, 2).float()
    found = solve(cost, mu, nu, KINDS[kind])
    assert found.plan.dtype == found.push.dtype == torch.float64
    want = solve(cost.double(), mu.double(), nu.double(), KINDS[kind])
    same(found, want.plan, atol=1e-12)


def test_masses_count_relative_to_their_sum() -> None:
    cost, mu, nu = normal(11, 7).square(), weights(11, 1), weights(7, 2)
    same(solve(cost, 3 * mu, 1000 * nu), solve(cost, mu, nu).plan, atol=1e-12)


def test_on_a_line_the_exact_plan_matches_in_order() -> None:
    x, y = normal(17, seed=1), normal(7, seed=2)
    mu, nu = weights(17, 3), weights(7, 4)
    # POT's closed form: sorted against sorted
    want = torch.from_numpy(ot.emd_1d(x.numpy(), y.numpy(), mu.numpy(), nu.numpy()))
    same(solve(weight_cost(x[:, None], y[:, None]), mu, nu), want, atol=1e-12)


def test_a_huge_reg_gives_the_independent_coupling_and_a_small_one_the_exact_plan() -> None:
    cost, mu, nu = normal(11, 7).square(), weights(11, 1), weights(7, 2)
    # the plan's relative change is of the order of cost / reg
    same(solve(cost, mu, nu, soft(1e6)), torch.outer(mu, nu), atol=1e-6)
    found = solve(cost, mu, nu, soft(1e-3))
    assert bool(torch.isfinite(found.plan).all())
    same(found, solve(cost, mu, nu).plan, atol=1e-5)  # e^(-gap / reg) of the next best plan


def test_the_assignment_costs_what_the_network_simplex_finds() -> None:
    cost = normal(31, 31).square()
    simplex, _ = exact.dense_exact(cost, uniform(31), uniform(31))
    same(solve(cost), simplex, atol=1e-12)


def offset_cost(n: int, m: int) -> Tensor:
    """Squared distances of shifted points: row and column sums hide which pairs are cheap."""
    return weight_cost(normal(n, 5, seed=1) + 3, normal(m, 5, seed=2))


@pytest.mark.parametrize("neighbours", [1, 3, 8])
@pytest.mark.parametrize("equal", [True, False])
def test_the_sparse_solver_is_exact(
    equal: bool, neighbours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "NEIGHBOURS", neighbours)
    monkeypatch.setattr(exact, "ROUNDS", 50)
    monkeypatch.setattr(exact, "MOST_ADDED", 1)
    cost = offset_cost(97, 61)
    mu = uniform(97) if equal else weights(97, 1)
    nu = uniform(61) if equal else weights(61, 2)
    found = exact.sparse_exact(cost, mu, nu)
    assert found is not None
    torch.testing.assert_close(found.sum(1), mu, rtol=0, atol=1e-12)  # float64 sums
    torch.testing.assert_close(found.sum(0), nu, rtol=0, atol=1e-12)
    want = float((ot.emd(mu, nu, cost) * cost).sum())
    assert float((found * cost).sum()) == pytest.approx(want, rel=1e-10)  # the price tolerance


def test_a_sparse_problem_that_needs_too_many_rounds_goes_to_the_dense_solver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost, mu, nu = offset_cost(97, 61), weights(97, 1), weights(61, 2)
    want = solve(cost, mu, nu)
    monkeypatch.setattr(exact, "NEIGHBOURS", 1)
    monkeypatch.setattr(exact, "ROUNDS", 1)
    monkeypatch.setattr(exact, "SPARSE_FROM", 1)
    assert exact.sparse_exact(cost, mu, nu) is None  # or this test is blind
    same(solve(cost, mu, nu), want.plan, atol=1e-12)


def test_large_problems_are_solved_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, mu, nu = offset_cost(97, 61), weights(97, 1), weights(61, 2)
    want = solve(cost, mu, nu)
    monkeypatch.setattr(exact, "SPARSE_FROM", 97 * 61)
    monkeypatch.setattr(exact, "dense_exact", None)  # calling it would fail
    same(solve(cost, mu, nu), want.plan, atol=1e-12)


def test_the_entropic_plan_is_pots_log_domain_plan() -> None:
    cost, mu, nu = normal(17, 11).square(), weights(17, 1), weights(11, 2)
    for reg in (0.03, 0.3):
        want = ot.bregman.sinkhorn_log(
            mu, nu, cost, reg * float(cost.mean()), numItermax=20_000, stopThr=1e-12
        )
        same(solve(cost, mu, nu, soft(reg)), want)


def test_our_own_sweeps_reach_pots_plan_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropic, "ROUGH_TOLERANCE", 1e-12)
    monkeypatch.setattr(entropic, "ROUGH_ITERATIONS", 10_000)
    cost, mu, nu = normal(17, 11).square(), weights(17, 1), weights(11, 2)
    for reg in (0.03, 0.3):
        found = entropic.sinkhorn(cost, mu, nu, reg, rough=True)
        want = ot.bregman.sinkhorn_log(mu, nu, cost, reg, numItermax=20_000, stopThr=1e-12)
        torch.testing.assert_close(found.plan, want, rtol=0, atol=1e-10)  # POT's marginal error
        assert found.converged


def test_a_kernel_that_underflows_goes_to_the_log_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, mu, nu = normal(17, 11).square(), weights(17, 1), weights(11, 2)
    want = solve(cost, mu, nu, soft(0.1))
    vanished = torch.full_like(cost, math.nan), {"err": [math.nan]}
    monkeypatch.setattr(ot.bregman, "sinkhorn_stabilized", lambda *_, **__: vanished)
    found = solve(cost, mu, nu, soft(0.1))
    assert found.converged
    same(found, want.plan)


def test_a_regulariser_far_below_the_cost_does_not_underflow() -> None:
    cost = normal(17, 11).square() * 1e6
    found = solve(cost, weights(17, 1), weights(11, 2), soft(1e-4))
    assert bool(torch.isfinite(found.plan).all())
    assert float(found.plan.sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("solver", [Solver(), soft(0.05), Solver("sinkhorn", effective_units=3)])
def test_a_cost_of_zeros_is_no_trouble(solver: Solver) -> None:
    if solver.effective_units:
        with pytest.raises(ValueError, match="tied costs stay mixed"):
            solve(torch.zeros(5, 3), solver=solver)
    else:
        assert solve(torch.zeros(5, 3), solver=solver).converged


@pytest.mark.parametrize(
    ("cost", "mu", "nu", "message"),
    [
        (torch.ones(5), None, None, "matrix of units by units"),
        (torch.ones(0, 3), None, None, "matrix of units by units"),
        (torch.full((2, 3), math.nan), None, None, "NaN or infinite"),
        (torch.ones(2, 3), torch.ones(3), None, "mu must hold 2 masses"),
        (torch.ones(2, 3), None, torch.ones(2), "nu must hold 3 masses"),
        (torch.ones(2, 3), torch.tensor([1.0, -0.5]), None, "mu must hold finite masses"),
        (torch.ones(2, 3), torch.tensor([1.0, math.nan]), None, "mu must hold finite masses"),
        (torch.ones(2, 3), None, torch.zeros(3), "nu must hold finite masses"),
    ],
)
def test_malformed_problems_are_refused(
    cost: Tensor, mu: Tensor | None, nu: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solve(cost, mu, nu)
