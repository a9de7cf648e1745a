"""Streamed moments against one shot and against numpy, for any shapes and chunks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfuse.moments import BLOCK, Moments
from slimfuse.transport import Solver, solve, standardised_cost

# float64 sums of at most 60 products of order 1, in another order
SUMS = {"rtol": 1e-9, "atol": 1e-11}
shapes = st.tuples(
    st.integers(2, 60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**31 - 1)
)


def rows(n: int, a: int, b: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(n, width, generator=generator, dtype=torch.float64) + 0.5 for width in (a, b)
    )
    return x, y, torch.rand(n, generator=generator, dtype=torch.float64) + 0.1


def one_shot(x: Tensor, y: Tensor, w: Tensor | None = None) -> Moments:
    moments = Moments(x=x.shape[1], y=y.shape[1])
    moments.update(w, x=x, y=y)
    return moments


def same(a: Moments, b: Moments) -> None:
    assert a.weight == pytest.approx(b.weight, rel=1e-12)
    for left in a.widths:
        torch.testing.assert_close(a.mean(left), b.mean(left), **SUMS)
        for right in a.widths:
            torch.testing.assert_close(a.cov(left, right), b.cov(left, right), **SUMS)


@settings(deadline=None, max_examples=50)
@given(shapes, st.lists(st.integers(1, 59), max_size=6))
def test_any_chunks_give_what_one_shot_gives(
    shape: tuple[int, int, int, int], cuts: list[int]
) -> None:
    x, y, w = rows(*shape)
    edges = sorted({0, len(x), *(c for c in cuts if c < len(x))})
    moments = Moments(x=shape[1], y=shape[2])
    for a, b in pairwise(edges):
        moments.update(w[a:b], x=x[a:b], y=y[a:b])
    same(moments, one_shot(x, y, w))


@settings(deadline=None, max_examples=50)
@given(shapes)
def test_mean_cov_and_second_moment_are_numpys(shape: tuple[int, int, int, int]) -> None:
    x, y, w = rows(*shape)
    moments = one_shot(x, y, w)
    joint = np.concatenate([x.numpy(), y.numpy()], axis=1)
    cov = torch.from_numpy(np.atleast_2d(np.cov(joint, rowvar=False, aweights=w.numpy(), ddof=0)))
    mean = torch.from_numpy(np.average(joint, axis=0, weights=w.numpy()))
    a = shape[1]
    torch.testing.assert_close(moments.mean("y"), mean[a:], **SUMS)
    torch.testing.assert_close(moments.cov("x"), cov[:a, :a], **SUMS)
    torch.testing.assert_close(moments.cov("x", "y"), cov[:a, a:], **SUMS)
    want = (x * w[:, None]).T @ y / w.sum()
    torch.testing.assert_close(moments.second("x", "y"), want, **SUMS)


@settings(deadline=None, max_examples=50)
@given(shapes, st.integers(1, 59))
def test_merging_two_shards_is_seeing_both(shape: tuple[int, int, int, int], cut: int) -> None:
    x, y, w = rows(*shape)
    cut = 1 + cut % (len(x) - 1)
    left, right = one_shot(x[:cut], y[:cut], w[:cut]), one_shot(x[cut:], y[cut:], w[cut:])
    left.merge(right)
    same(left, one_shot(x, y, w))


def test_merging_an_empty_shard_changes_nothing_and_merging_into_one_copies() -> None:
    x, y, w = rows(19, 5, 3, 0)
    full, empty = one_shot(x, y, w), Moments(x=5, y=3)
    full.merge(Moments(x=5, y=3))
    same(full, one_shot(x, y, w))
    empty.merge(full)
    same(empty, full)


def test_weights_default_to_ones_and_a_weight_of_two_is_a_row_seen_twice() -> None:
    x, y, _ = rows(19, 5, 3, 0)
    same(one_shot(x, y), one_shot(x, y, torch.ones(19)))
    twice = one_shot(torch.cat([x, x[:7]]), torch.cat([y, y[:7]]))
    same(one_shot(x, y, torch.tensor([2.0] * 7 + [1.0] * 12)), twice)


def test_a_large_mean_costs_no_digits() -> None:
    x, y, w = rows(57, 5, 3, 0)
    far = 2.0**30  # a power of two, and x rounded to its grid: adding it loses nothing
    x = (x * 2**20).round() / 2**20
    moments = Moments(x=5, y=3)
    for i in range(0, 57, 10):
        moments.update(w[i : i + 10], x=x[i : i + 10] + far, y=y[i : i + 10])
    want = one_shot(x, y, w)
    torch.testing.assert_close(moments.cov("x"), want.cov("x"), **SUMS)
    torch.testing.assert_close(moments.cov("x", "y"), want.cov("x", "y"), **SUMS)
    # without a shift E[x²] - E[x]² has an error of 2^60 · 2^-53 = 128
    w = w / w.sum()
    naive = ((x + far) * w[:, None]).T @ (x + far)
    mean = (w[:, None] * (x + far)).sum(0)
    assert float((naive - torch.outer(mean, mean) - want.cov("x")).abs().max()) > 1


def test_merging_shards_with_far_shifts_keeps_their_digits() -> None:
    x, y, w = rows(57, 5, 3, 0)
    x = (x * 2**20).round() / 2**20 + 2.0**30
    left, right = one_shot(x[:20], y[:20], w[:20]), one_shot(x[20:], y[20:], w[20:])
    left.merge(right)
    same(left, one_shot(x, y, w))


def test_float32_rows_are_summed_in_float64() -> None:
    x, y, w = rows(57, 5, 3, 0)
    x, y = x.float(), y.float()
    same(one_shot(x, y, w), one_shot(x.double(), y.double(), w))


def test_memory_does_not_depend_on_the_rows() -> None:
    def size(n: int) -> int:
        moments = one_shot(*rows(n, 5, 3, 0))
        tensors = [v for v in vars(moments).values() if isinstance(v, Tensor)]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)  # no views of rows
        return sum(t.nbytes for t in tensors)

    assert size(10) == size(1000) == 8 * (8 * 8 + 8 + 8)


def test_asking_before_any_row_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="no rows"):
        Moments(x=3).mean("x")


def test_float32_products_reproduce_the_materialised_cost_and_plan() -> None:
    """What wide layers use: float32 rows and products, float64 sums."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(30, 41, generator=generator)
    rows = (torch.randn(5000, 30, generator=generator) @ mix + 3.0).float()
    x, y = rows[:, :23], rows[:, 23:]
    moments = Moments(torch.float32, x=23, y=18)
    for part in rows.split(700):
        moments.update(x=part[:, :23], y=part[:, 23:])
    vx, vy = moments.cov("x").diagonal(), moments.cov("y").diagonal()
    streamed = standardised_cost(moments.cov("x", "y"), vx, vy)
    zx, zy = (((z - z.mean(0)) / z.std(0, correction=0)) for z in (x.double(), y.double()))
    whole = (zx[:, :, None] - zy[:, None, :]).square().mean(0)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-6)  # the bound
    soft = Solver("sinkhorn", reg=0.1)
    plans = [solve(cost, solver=soft).plan for cost in (streamed, whole)]
    torch.testing.assert_close(*plans, rtol=0, atol=1e-8)  # the bound


def test_wide_moments_are_whole_below_the_diagonal_after_every_read() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, BLOCK + 3, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 2 * BLOCK - 7, generator=generator, dtype=torch.float64)
    moments = Moments(x=x.shape[1], y=y.shape[1])
    for stop in (11, 40):  # read, then go on
        moments.update(x=x[stop - 11 : stop], y=y[stop - 11 : stop])
        seen = torch.cat([x[:11], x[29:]]) if stop == 40 else x[:11]
        torch.testing.assert_close(moments.cov("x"), torch.cov(seen.T, correction=0), **SUMS)
        torch.testing.assert_close(moments.cov("y", "x"), moments.cov("x", "y").T, **SUMS)
    joint = torch.cat([torch.cat([x[:11], x[29:]]), torch.cat([y[:11], y[29:]])], dim=1)
    want = torch.cov(joint.T, correction=0)[x.shape[1] :, : x.shape[1]]
    torch.testing.assert_close(moments.cov("y", "x"), want, **SUMS)
