"""Unbalanced and partial plans, and softness by effective units, against POT and optimality."""

from __future__ import annotations

import math
from typing import Any

import ot
import pytest
import torch
from tiny import duplicate
from torch import Tensor

from slimfuse.transport import Solver, entropic, exact, solve, uniform
from slimfuse.transport.softness import UNITS_TOLERANCE

CLOSE = {"rtol": 0, "atol": 1e-8}  # the solvers stop at 1e-9, masses are of the order of 0.1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int = 11, m: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    mu, nu = normal(n, seed=1).exp(), normal(m, seed=2).exp()
    return normal(n, m).square(), mu / mu.sum(), nu / nu.sum()


@pytest.mark.parametrize("reg", [0.1, 1.0])
@pytest.mark.parametrize("marginal_reg", [0.1, 1.0, 30.0])
def test_the_unbalanced_plan_is_pots(reg: float, marginal_reg: float) -> None:
    cost, mu, nu = problem()
    unit = float(cost.mean())
    want = ot.unbalanced.sinkhorn_unbalanced(
        mu, nu, cost, reg * unit, marginal_reg * unit,
        method="sinkhorn_translation_invariant", numItermax=20_000, stopThr=1e-13,
    )  # fmt: skip
    found = solve(cost, mu, nu, Solver("unbalanced", reg=reg, marginal_reg=marginal_reg))
    assert found.converged
    torch.testing.assert_close(found.plan, want, **CLOSE)
    other = ot.unbalanced.mm_unbalanced(
        mu, nu, cost, marginal_reg * unit, reg=reg * unit, numItermax=20_000, stopThr=1e-14
    )  # another algorithm, which creeps: its last steps are small long before it is there
    torch.testing.assert_close(found.plan, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reg", [0.003, 0.05])
def test_the_unbalanced_plan_is_stationary_where_pots_kernels_vanish(reg: float) -> None:
    cost, mu, nu = problem()
    unit = float(cost.mean())
    found = entropic.unbalanced(cost, mu, nu, reg * unit, unit)
    assert found.converged
    positive = found.plan.clamp_min(1e-300)  # farther pairs have no logarithm to check
    kept = found.plan > 1e-300
    slope = cost + reg * unit * (positive.log() - torch.outer(mu, nu).log())
    rows, columns = (found.plan.sum(1) / mu).log(), (found.plan.sum(0) / nu).log()
    slope = slope + unit * (rows[:, None] + columns)
    # the stopping tolerance times reg, through logarithms of sums
    assert float(slope[kept].abs().max()) < 1e-7 * unit


def test_a_large_marginal_penalty_gives_the_balanced_plan() -> None:
    cost, mu, nu = problem()
    want = solve(cost, mu, nu, Solver("sinkhorn", reg=0.2))
    found = solve(cost, mu, nu, Solver("unbalanced", reg=0.2, marginal_reg=1e6))
    assert found.converged
    torch.testing.assert_close(found.plan, want.plan, rtol=0, atol=1e-5)  # 1 / marginal_reg
    assert found.marginal_error < 1e-5


def test_an_unbalanced_kernel_that_underflows_still_gives_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost, mu, nu = problem()
    reg, rho = 0.05 * float(cost.mean()), float(cost.mean())
    want = entropic.unbalanced(cost, mu, nu, reg, rho).plan
    # with this bound every row counts as underflown: all steps in the log domain
    monkeypatch.setattr(entropic, "ABSORB", 1e-300)
    torch.testing.assert_close(entropic.unbalanced(cost, mu, nu, reg, rho).plan, want, **CLOSE)


def test_an_unbalanced_unit_far_from_all_loses_its_mass_and_says_so() -> None:
    cost, mu, nu = problem()
    cost[3] += 20 * cost.mean()
    found = solve(cost, mu, nu, Solver("unbalanced", reg=0.1))
    assert float(found.mu[3]) < 1e-2 * float(mu[3])  # 20 means away; its mass costs one a unit
    torch.testing.assert_close(found.mu, found.plan.sum(1), rtol=0, atol=0)
    torch.testing.assert_close(found.nu, found.plan.sum(0), rtol=0, atol=0)
    gaps = (found.mu - mu).abs().max(), (found.nu - nu).abs().max()
    assert found.marginal_error == pytest.approx(float(max(gaps)), rel=1e-12)
    assert found.converged


@pytest.mark.parametrize("kind", ["unbalanced", "partial"])
def test_a_plan_cut_short_says_so(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropic, "ITERATIONS", 1)
    cost, mu, nu = problem()
    assert not solve(cost, mu, nu, Solver(kind, reg=0.05, mass=0.6)).converged


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.95])
def test_the_exact_partial_plan_costs_what_pots_does(mass: float) -> None:
    cost, mu, nu = problem(17, 11)
    found = solve(cost, mu, nu, Solver("partial", mass=mass))
    want = ot.partial.partial_wasserstein(mu, nu, cost, m=mass)
    assert found.cost == pytest.approx(float((want * cost).sum()), rel=1e-10)
    assert float(found.plan.sum()) == pytest.approx(mass, abs=1e-11)  # dust is removed
    assert float((found.plan.sum(1) - mu).max()) < 1e-12
    assert float((found.plan.sum(0) - nu).max()) < 1e-12
    torch.testing.assert_close(found.mu, found.plan.sum(1), rtol=0, atol=0)
    assert found.converged


def test_a_partial_plan_of_shifted_costs_is_the_same() -> None:
    cost, mu, nu = problem()
    want = solve(cost, mu, nu, Solver("partial", mass=0.4))
    for shift in (-5.0, 100.0):
        found = solve(cost + shift, mu, nu, Solver("partial", mass=0.4))
        torch.testing.assert_close(found.plan, want.plan, rtol=0, atol=1e-12)


def test_a_partial_plan_of_no_cost_moves_what_was_asked_for() -> None:
    found = solve(torch.zeros(5, 3), solver=Solver("partial", mass=0.4))
    assert float(found.plan.sum()) == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize("reg", [None, 0.2])
def test_moving_all_the_mass_is_the_balanced_plan(reg: float | None) -> None:
    cost, mu, nu = problem()
    balanced = Solver() if reg is None else Solver("sinkhorn", reg=reg)
    want = solve(cost, mu, nu, balanced).plan
    found = solve(cost, mu, nu, Solver("partial", reg=reg, mass=1))
    torch.testing.assert_close(found.plan, want, **CLOSE)
    found = solve(cost, mu, nu, Solver("partial", reg=reg, mass=1 - 1e-9))  # the limit agrees
    torch.testing.assert_close(found.plan, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mass", [0.3, 0.8])
@pytest.mark.parametrize("reg", [0.05, 0.3])
def test_the_entropic_partial_plan_meets_its_optimality_conditions(reg: float, mass: float) -> None:
    cost, mu, nu = problem()
    found = solve(cost, mu, nu, Solver("partial", reg=reg, mass=mass))
    assert found.converged
    assert float(found.plan.sum()) == pytest.approx(mass, rel=1e-9)
    free_rows, free_columns = found.mu < mu - 1e-6, found.nu < nu - 1e-6
    # P = s a_i b_j exp(-C / reg) with a, b ≤ 1, and = 1 where the bound does not bind
    log = found.plan.log() + cost / (reg * float(cost.mean()))
    a = log - log[:, :1]  # rows differ by log a_i alone
    torch.testing.assert_close(a, a[:1].expand_as(a), rtol=0, atol=1e-6)
    for scale, free in ((log[:, 0], free_rows), (log[0], free_columns)):
        assert bool(free.any())
        top = scale[free].max()
        torch.testing.assert_close(
            scale[free], top.expand_as(scale[free]), rtol=0, atol=1e-6
        )  # Dykstra stops at steps of 1e-9
        assert bool((scale <= top + 1e-6).all())


def test_a_large_partial_problem_is_solved_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, mu, nu = problem(61, 47)
    want = solve(cost, mu, nu, Solver("partial", mass=0.7))
    monkeypatch.setattr(exact, "SPARSE_FROM", 1)
    found = solve(cost, mu, nu, Solver("partial", mass=0.7))
    assert found.cost == pytest.approx(want.cost, rel=1e-10)


KINDS: dict[str, Any] = {
    "sinkhorn": {"kind": "sinkhorn"},
    "unbalanced": {"kind": "unbalanced", "marginal_reg": 0.7},
    "partial": {"kind": "partial", "mass": 0.8},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [2.6, 4.0, 9.0])
def test_effective_units_are_hit(kind: str, units: float) -> None:
    cost = normal(17, 11).square()
    found = solve(cost, solver=Solver(effective_units=units, **KINDS[kind]))
    assert found.converged
    assert found.effective_units == pytest.approx(units, rel=UNITS_TOLERANCE)


def test_effective_units_with_unequal_masses() -> None:
    cost, mu, nu = problem(17, 11)
    found = solve(cost, mu, nu, Solver("sinkhorn", effective_units=5))
    assert found.effective_units == pytest.approx(5, rel=UNITS_TOLERANCE)
    assert found.marginal_error < 1e-8


def test_the_ends_of_effective_units_are_the_exact_and_the_independent_plan() -> None:
    cost, mu, nu = problem(17, 11)
    exact_plan = solve(cost, mu, nu)
    units = exact_plan.effective_units
    found = solve(cost, mu, nu, Solver("sinkhorn", effective_units=units))
    torch.testing.assert_close(found.plan, exact_plan.plan, rtol=0, atol=0)
    softest = math.exp(float(-torch.special.xlogy(mu, mu).sum()))
    found = solve(cost, mu, nu, Solver("sinkhorn", effective_units=softest))
    # 0.1 % of perplexity is a deviation of some per cent from independence
    torch.testing.assert_close(found.plan, torch.outer(mu, nu), rtol=0.2, atol=0)


@pytest.mark.parametrize("units", [1.0, 18.0])
def test_impossible_effective_units_are_refused_with_what_is_possible(units: float) -> None:
    cost = normal(17, 7).square()  # 17 sources in 7 targets: at least 17 / 7 each
    with pytest.raises(ValueError, match=r"out of reach.*between .* and 17 "):
        solve(cost, solver=Solver("sinkhorn", effective_units=units))


def test_an_unbalanced_plan_that_cannot_harden_is_refused() -> None:
    cost = torch.zeros(6, 4)  # all ties: every regulariser mixes all six
    with pytest.raises(ValueError, match="still mixes 6 at"):
        solve(cost, solver=Solver("unbalanced", effective_units=2))


def test_a_widened_copy_is_found_at_two_units_per_target() -> None:
    points = normal(7, 5)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    coupling = duplicate(7).plan.T[order]
    wide = (coupling > 0).double() @ points
    cost = torch.cdist(wide, points).square()
    found = solve(cost, solver=Solver("sinkhorn", effective_units=2))
    torch.testing.assert_close(found.plan, coupling, rtol=0, atol=1e-12)
    found = solve(cost, solver=Solver("sinkhorn", reg=1e-3))
    torch.testing.assert_close(found.plan, coupling, **CLOSE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "emdd"}, "known: emd, sinkhorn, unbalanced, partial"),
        ({"kind": "sinkhorn"}, "needs a softness"),
        ({"kind": "unbalanced"}, "needs a softness"),
        ({"kind": "emd", "reg": 0.1}, "has no softness"),
        ({"kind": "emd", "effective_units": 2}, "has no softness"),
        ({"kind": "sinkhorn", "reg": 0.1, "effective_units": 2}, "give one of them"),
        ({"kind": "sinkhorn", "reg": 0}, "reg must be above 0"),
        ({"kind": "sinkhorn", "reg": math.nan}, "reg must be above 0"),
        ({"kind": "sinkhorn", "effective_units": 0.5}, "at least 1"),
        ({"kind": "unbalanced", "reg": 0.1, "marginal_reg": 0}, "marginal_reg must be above 0"),
        ({"kind": "partial", "mass": 0}, "share above 0"),
        ({"kind": "partial", "mass": 1.5}, "share above 0"),
    ],
)
def test_solvers_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(**settings)


def test_masses_default_to_uniform_for_every_kind() -> None:
    cost, _, _ = problem()
    solver = Solver("unbalanced", reg=0.3)
    want = solve(cost, uniform(11), uniform(7), solver)
    torch.testing.assert_close(solve(cost, solver=solver).plan, want.plan, rtol=0, atol=1e-12)
