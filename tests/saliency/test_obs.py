"""Optimal Brain Surgeon against brute force: least squares, KKT systems, exhaustive choice."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saliency.small_nets import dense_fisher, mlp, pairs, rows
from torch import Tensor

from slimfuse.saliency import obs
from slimfuse.saliency.inverse import Route, invert

BLOCK, DAMPING = 10, 1e-2
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, exact identities at a condition of 1e3
ROUTES: list[Route] = ["gram", "samples", "rank-one"]
seeds = st.integers(0, 2**31 - 1)


def problem(seed: int = 0, samples: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients (m, 30), weights (3, 10), a mask of what stays, and F (30, 30)."""
    model = mlp(6, 5, 3, seed=seed % 100)
    x = rows(model, pairs(samples, 6, 3, seed=seed))
    kept = torch.rand(3, BLOCK, generator=torch.Generator().manual_seed(seed)) < 0.5
    return x, model[0].weight.detach().view(3, BLOCK), kept, dense_fisher(x, BLOCK, DAMPING)


def constrained(fisher: Tensor, w: Tensor, kept: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Return argmin ½ δᵀFδ + ḡᵀδ under δ_Q = −w_Q by its KKT system."""
    gone = (~kept.flatten()).nonzero()[:, 0]
    rows_ = torch.eye(len(fisher), dtype=torch.float64)[gone]
    system = torch.cat(
        [
            torch.cat([fisher, rows_.T], 1),
            torch.cat([rows_, torch.zeros(len(gone), len(gone)).double()], 1),
        ]
    )
    force = torch.zeros(len(fisher)).double() if gradient is None else -gradient.flatten()
    right = torch.cat([force, -w.flatten()[gone]])
    return torch.linalg.solve(system, right)[: len(fisher)].view_as(w)


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from(ROUTES))
def test_joint_is_sequential_is_ridge_least_squares(seed: int, route: Route) -> None:
    x, w, kept, fisher = problem(seed)
    inverse = invert(x, BLOCK, DAMPING, route=route)
    joint = obs.update(inverse, w, kept)

    dense, one_by_one = torch.linalg.inv(fisher), w.flatten().clone()
    for q in (~kept.flatten()).nonzero()[:, 0]:
        one_by_one -= dense[:, q] * one_by_one[q] / dense[q, q]
        dense -= torch.outer(dense[:, q], dense[q]) / dense[q, q]
        dense[q], dense[:, q], dense[q, q] = 0, 0, 1
    torch.testing.assert_close(joint.flatten() * kept.flatten(), one_by_one * kept.flatten(),
                               **EXACT)  # fmt: skip

    # ridge about w on what is kept: |X(w' − w)|²/m + λ|w' − w|², block by block
    for k in range(len(w)):
        own, stays = x[:, BLOCK * k : BLOCK * (k + 1)], kept[k]
        tall = torch.cat([own / len(x) ** 0.5, DAMPING**0.5 * torch.eye(BLOCK).double()])
        best = torch.linalg.lstsq(tall[:, stays], tall @ w[k]).solution
        torch.testing.assert_close(joint[k][stays], best, **EXACT)
        assert not joint[k][~stays].any()


@pytest.mark.parametrize("route", ROUTES)
def test_the_joint_update_is_the_published_formula(route: Route) -> None:
    x, w, kept, fisher = problem(1)
    q = (~kept.flatten()).nonzero()[:, 0]
    dense = torch.linalg.inv(fisher)
    inner = torch.linalg.inv(dense[q][:, q])
    expected = w.flatten() - dense[:, q] @ inner @ w.flatten()[q]
    inverse = invert(x, BLOCK, DAMPING, route=route)
    found = obs.update(inverse, w, kept)
    torch.testing.assert_close(found.flatten(), expected, **EXACT)
    # and it costs ρ_Q
    cost = obs.increase(inverse, found - w).sum()
    torch.testing.assert_close(cost, 0.5 * w.flatten()[q] @ inner @ w.flatten()[q], **EXACT)


@pytest.mark.parametrize("route", ROUTES)
def test_single_updates_add_up(route: Route) -> None:
    x, w, kept, fisher = problem(2)
    dense, expected = torch.linalg.inv(fisher), w.flatten().clone()
    for q in (~kept.flatten()).nonzero()[:, 0]:
        expected -= w.flatten()[q] / dense[q, q] * dense[:, q]
    inverse = invert(x, BLOCK, DAMPING, route=route)
    single = obs.update(inverse, w, kept, "single")
    torch.testing.assert_close(single.flatten(), expected * kept.flatten(), **EXACT)
    joint = obs.update(inverse, w, kept, "joint")
    cost = {k: obs.increase(inverse, v - w).sum() for k, v in (("s", single), ("j", joint))}
    assert cost["j"] < cost["s"]
    assert torch.equal(obs.update(inverse, w, kept, "none"), w * kept)


def test_removing_one_costs_its_statistic() -> None:
    x, w, _, _ = problem(3)
    inverse = invert(x, BLOCK, DAMPING)
    rho = obs.statistic(inverse, w)
    for q in range(BLOCK):
        kept = torch.ones_like(w, dtype=torch.bool)
        kept[:, q] = False
        change = obs.update(inverse, w, kept) - w
        torch.testing.assert_close(obs.increase(inverse, change), rho[:, q], **EXACT)
        torch.testing.assert_close(change, obs.update(inverse, w, kept, "single") - w, **EXACT)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [2, 5, 10])
def test_removing_a_group_costs_its_statistic(route: Route, size: int) -> None:
    x, w, _, fisher = problem(4)
    inverse = invert(x, BLOCK, DAMPING, route=route)
    found = obs.group_statistic(inverse, w, size).flatten()
    dense = torch.linalg.inv(fisher)
    for k, value in enumerate(found):
        q = torch.arange(size * k, size * (k + 1))
        own = w.flatten()[q]
        torch.testing.assert_close(
            value, 0.5 * own @ torch.linalg.inv(dense[q][:, q]) @ own, **EXACT
        )
    torch.testing.assert_close(
        obs.group_statistic(inverse, w, 1), obs.statistic(inverse, w), **EXACT
    )


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from(ROUTES))
def test_woodtaylor_is_the_constrained_minimiser(seed: int, route: Route) -> None:
    x, w, kept, fisher = problem(seed)
    gradient = x.mean(0).view(3, BLOCK)
    inverse = invert(x, BLOCK, DAMPING, route=route)
    found = obs.taylor_update(inverse, w, gradient, kept)
    torch.testing.assert_close(found - w, constrained(fisher, w, kept, gradient), **EXACT)
    # the statistic of one weight is the minimum under that weight's constraint alone
    rho = obs.taylor_statistic(inverse, w, gradient).flatten()
    for q in (0, 13, 29):
        one = torch.ones(3, BLOCK, dtype=torch.bool)
        one.view(-1)[q] = False
        change = constrained(fisher, w, one, gradient)
        model = 0.5 * change.flatten() @ fisher @ change.flatten() + (gradient * change).sum()
        torch.testing.assert_close(rho[q], model, **EXACT)
        torch.testing.assert_close(
            obs.taylor_update(inverse, w, gradient, one, "single") - w, change, **EXACT
        )
    # without a gradient it is WoodFisher
    nought = torch.zeros_like(gradient)
    torch.testing.assert_close(obs.taylor_update(inverse, w, nought, kept),
                               obs.update(inverse, w, kept), **EXACT)  # fmt: skip
    torch.testing.assert_close(obs.taylor_statistic(inverse, w, nought),
                               obs.statistic(inverse, w), **EXACT)  # fmt: skip


@pytest.mark.parametrize(("size", "removed"), [(2, 1), (5, 2), (5, 4), (10, 3)])
def test_the_best_of_all_patterns_is_kept(size: int, removed: int) -> None:
    x, w, _, fisher = problem(5)
    inverse = invert(x, BLOCK, DAMPING)
    alive = torch.ones_like(w, dtype=torch.bool)
    limit = obs.MOST_SETS
    obs.MOST_SETS = 1000  # all 120 sets of three of ten
    try:
        found = obs.keep_of_every(inverse, w, alive, size, removed).view(-1, size)
    finally:
        obs.MOST_SETS = limit
    dense = torch.linalg.inv(fisher)
    for k, kept in enumerate(found):
        costs = {}
        for gone in combinations(range(size), removed):
            q = torch.tensor(gone) + size * k
            own = w.flatten()[q]
            costs[gone] = float(0.5 * own @ torch.linalg.inv(dense[q][:, q]) @ own)
        assert tuple((~kept).nonzero()[:, 0].tolist()) == min(costs, key=costs.__getitem__)


def test_a_long_group_goes_one_by_one() -> None:
    x, w, _, fisher = problem(6)
    inverse = invert(x, BLOCK, DAMPING)
    found = obs.keep_of_every(inverse, w, torch.ones_like(w, dtype=torch.bool), BLOCK, 4)
    for k in range(len(w)):
        part = slice(BLOCK * k, BLOCK * (k + 1))
        own, left = torch.linalg.inv(fisher[part, part]), w[k].clone()
        stays = list(range(BLOCK))
        for _ in range(4):
            q = min(stays, key=lambda i: float(left[i] ** 2 / own[i, i]))
            stays.remove(q)
            left = left - own[:, q] * left[q] / own[q, q]
            own = own - torch.outer(own[:, q], own[q]) / own[q, q]
        assert found[k].nonzero()[:, 0].tolist() == stays


@pytest.mark.parametrize("removed", [2, 4])
def test_dead_weights_go_first(removed: int) -> None:
    x, w, _, _ = problem(7)
    alive = torch.ones_like(w, dtype=torch.bool)
    alive[:, [0, 9]] = False
    for size in (5, BLOCK):  # all sets; one by one
        inverse = invert(x, BLOCK, DAMPING).restricted(alive)
        kept = obs.keep_of_every(inverse, w * alive, alive, size, removed)
        assert not kept[~alive].any()
        assert (kept.view(-1, size).sum(1) == size - removed).all()
