"""Closed forms against least squares on the rows themselves and against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimfuse.fuse import greedy
from slimfuse.fuse.greedy import greedy_groups, greedy_units
from slimfuse.fuse.solve import decoder, reduce_scores, reduce_values, ridge, roots

# float64; condition numbers below 1e4 leave 1e-12 · 1e4, with a margin
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
N = 103


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x.T @ (x if y is None else y) / len(x)


def mixed(width: int, seed: int) -> Tensor:
    return normal(N, width, seed=seed) @ normal(width, width, seed=seed + 100)


@pytest.mark.parametrize("strength", [1e-5, 1e-3, 1.0])
def test_ridge_is_least_squares_with_the_prior_as_more_rows(strength: float) -> None:
    x, goal, prior = mixed(7, 0), normal(N, 5, seed=1), normal(5, 7, seed=2)
    gram = second(x)
    damp = (strength * gram.diagonal().mean()).sqrt()
    rows = torch.cat([x / N**0.5, damp * torch.eye(7).double()])
    wanted = torch.cat([goal / N**0.5, damp * prior.T])
    want = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(ridge(second(goal, x), gram, prior, strength), want, **CLOSE)


def test_a_strong_ridge_is_the_prior_and_a_right_prior_stays() -> None:
    x, truth, prior = mixed(7, 0), normal(5, 7, seed=2), normal(5, 7, seed=3)
    gram = second(x)
    found = ridge(truth @ gram, gram, prior, 1e12)
    torch.testing.assert_close(found, prior, rtol=0, atol=1e-9)  # off by 1/strength · condition
    torch.testing.assert_close(ridge(truth @ gram, gram, truth, 1e-3), truth, **CLOSE)


def test_ridge_stands_units_that_are_always_zero() -> None:
    x, truth, prior = mixed(7, 0), normal(5, 7, seed=2), normal(5, 7, seed=3)
    x[:, 3] = 0
    found = ridge(truth @ second(x), second(x), prior, 1e-3)
    torch.testing.assert_close(found[:, 3], prior[:, 3], **CLOSE)  # nothing else is known there


@pytest.mark.parametrize("rank", ["full", "a unit twice"])
def test_the_decoder_is_least_squares_on_rows(rank: str) -> None:
    x, push = mixed(7, 0), normal(7, 5, seed=1)
    if rank != "full":
        push[:, 4] = push[:, 1]  # the least-norm solution is shared by both
    want = torch.linalg.lstsq(x @ push, x, driver="gelsd", rcond=1e-10).solution.T
    torch.testing.assert_close(decoder(second(x), push), want, **CLOSE)


def missed(x: Tensor, out: Tensor, index: Tensor) -> float:
    """Return E|out(x - x̂)|² by least squares on the rows."""
    kept = x[:, index]
    best = kept @ torch.linalg.lstsq(kept, x, driver="gelsd").solution
    return float(((x - best) @ out.T).square().sum(1).mean())


@pytest.mark.parametrize("sizes", [(1,) * 11, (3, 2, 1, 3, 2)])
def test_every_greedy_pick_is_the_best_of_all_by_brute_force(sizes: tuple[int, ...]) -> None:
    x, out = mixed(11, 0), normal(5, 11, seed=1)
    groups = list(torch.split(torch.arange(11), list(sizes)))
    chosen = greedy_groups(second(x), out, groups, 4)
    for step, pick in enumerate(chosen):
        taken = [groups[g] for g in chosen[:step]]
        errors = {
            g: missed(x, out, torch.cat([*taken, index]))
            for g, index in enumerate(groups)
            if g not in chosen[:step]
        }
        assert pick == min(errors, key=errors.__getitem__)


def test_planted_copies_are_kept_once_each() -> None:
    sources = mixed(5, 0)
    owner = torch.randperm(15, generator=torch.Generator().manual_seed(1)) % 5
    x = sources[:, owner] * (normal(15, seed=2).abs() + 0.5)
    singles = list(torch.arange(15)[:, None])
    chosen = greedy_groups(second(x), normal(7, 15, seed=3), singles, 5)
    assert sorted(owner[chosen].tolist()) == [0, 1, 2, 3, 4]


def test_planted_copies_of_whole_heads_are_kept_once_each() -> None:
    sources = mixed(9, 0).reshape(N, 3, 3)
    owner = torch.tensor([2, 0, 1, 1, 0, 2, 0])
    heads = [sources[:, o] @ normal(3, 3, seed=i) for i, o in enumerate(owner)]
    x = torch.cat(heads, dim=1)
    groups = list(torch.split(torch.arange(21), 3))
    chosen = greedy_groups(second(x), normal(7, 21, seed=3), groups, 3)
    assert sorted(owner[chosen].tolist()) == [0, 1, 2]


def test_what_nobody_reads_is_not_kept() -> None:
    x, out = mixed(11, 0), normal(5, 11, seed=1)
    x = x / x.std(0)
    cov = torch.eye(11).double() * second(x).diagonal()  # no unit helps to predict another
    out[:, [0, 4, 9]] = 0
    chosen = greedy_groups(cov, out, list(torch.arange(11)[:, None]), 8)
    assert set(chosen) == set(range(11)) - {0, 4, 9}


def test_more_units_than_rank_are_still_different_units() -> None:
    x = normal(N, 3) @ normal(3, 11, seed=1)
    chosen = greedy_groups(second(x), normal(5, 11, seed=2), list(torch.arange(11)[:, None]), 9)
    assert len(set(chosen)) == 9


def test_roots_of_a_singular_matrix() -> None:
    x = normal(N, 3) @ normal(3, 7, seed=1)
    root, inverse = roots(second(x))
    torch.testing.assert_close(root @ root, second(x), **CLOSE)
    assert int(torch.linalg.matrix_rank(inverse)) == 3
    torch.testing.assert_close(root @ inverse @ root, root, **CLOSE)


def score_error(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> float:
    """Return E(q·k - (aᵀq)·(bᵀk))² over all pairs of rows."""
    return float((q @ k.T - (q @ a) @ (k @ b).T).square().mean())


@pytest.mark.parametrize("size", [1, 3, 5])
def test_reduced_scores_reach_the_eckart_young_bound(size: int) -> None:
    q, k = mixed(7, 0), mixed(7, 5)[:89]
    a, b = reduce_scores(second(q), second(k), size)
    assert a.shape == b.shape == (7, size)
    tail = torch.linalg.svdvals(q @ k.T)[size:].square().sum() / (len(q) * len(k))
    assert score_error(q, k, a, b) == pytest.approx(float(tail), rel=1e-8)
    for seed in range(50):  # nothing near it is better
        noise_a, noise_b = 0.05 * normal(7, size, seed=seed), 0.05 * normal(7, size, seed=seed + 99)
        assert score_error(q, k, a + noise_a, b + noise_b) > float(tail)


@pytest.mark.parametrize("size", [7, 9])
def test_reduced_scores_are_exact_at_full_rank_and_padded_beyond(size: int) -> None:
    q, k = mixed(7, 0), mixed(7, 5)
    a, b = reduce_scores(second(q), second(k), size)
    torch.testing.assert_close(a @ b.T, torch.eye(7).double(), **CLOSE)
    assert not a[:, 7:].any() and not b[:, 7:].any()


def test_reduced_scores_of_low_rank_queries_are_exact_at_that_rank() -> None:
    q, k = normal(N, 3) @ normal(3, 7, seed=1), mixed(7, 5)
    a, b = reduce_scores(second(q), second(k), 3)
    torch.testing.assert_close((q @ a) @ (k @ b).T, q @ k.T, **CLOSE)


@pytest.mark.parametrize("size", [1, 3])
def test_reduced_values_reach_the_eckart_young_bound(size: int) -> None:
    v, out = mixed(7, 0), normal(5, 7, seed=1)
    push = reduce_values(second(v), out, size)
    left = v - v @ push @ decoder(second(v), push).T
    tail = torch.linalg.svdvals(v @ out.T)[size:].square().sum() / N
    assert float((left @ out.T).square().sum(1).mean()) == pytest.approx(float(tail), rel=1e-8)


@pytest.mark.parametrize("size", [5, 7, 9])
def test_reduced_values_are_exact_from_the_rank_of_the_output_on(size: int) -> None:
    v, out = mixed(7, 0), normal(5, 7, seed=1)
    push = reduce_values(second(v), out, size)
    assert push.shape == (7, size)
    read = decoder(second(v), push)
    torch.testing.assert_close(v @ push @ read.T @ out.T, v @ out.T, **CLOSE)


def test_units_taken_several_at_once_explain_nearly_as_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(60, 25, generator=generator, dtype=torch.float64)
    mix = torch.cat([mix, mix[:30]])  # twins: taking both of a pair gains nothing
    cov = mix @ mix.T + 1e-3 * torch.eye(90, dtype=torch.float64)
    out = torch.randn(7, 90, generator=generator, dtype=torch.float64)

    def missed(kept: list[int]) -> float:
        back = decoder(cov, torch.eye(90, dtype=torch.float64)[:, kept])
        left = cov - back @ cov[kept]
        return float((out @ left * out).sum())

    one = greedy_units(cov, out, 20)
    monkeypatch.setattr(greedy, "AT_ONCE", 30)  # three at once, of 24
    monkeypatch.setattr(greedy, "CANDIDATES", 8)
    several = greedy_units(cov, out, 20)
    assert len(set(several)) == 20
    assert not any(i + 60 in several for i in several if i < 30)
    assert missed(several) <= 1.25 * missed(one)
    assert missed(list(range(20))) > 1.5 * missed(one)  # not every choice is as good
