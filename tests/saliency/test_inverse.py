"""Every route to the inverse Fisher against the dense inverse, and what no route may depend on."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saliency.small_nets import dense_fisher, mlp, pairs, rows
from torch import Tensor

from slimfuse.errors import SlimfuseError, UserError
from slimfuse.saliency.inverse import BlockInverse, Damping, GramInverse, Route, choose, invert
from slimfuse.saliency.obs import statistic

ROUTES: list[Route] = ["gram", "samples", "rank-one"]
# float64; the largest eigenvalues of these Fishers are 1e-1, so that λ = 1e-7 costs six digits
TRUTH = 1e-9
shapes = st.tuples(
    st.integers(1, 9), st.integers(1, 17), st.integers(1, 17), st.integers(0, 2**31 - 1)
)
dampings = st.floats(-7, 1).map(lambda exponent: 10.0**exponent)


def blocks_of(matrix: Tensor, block: int) -> Tensor:
    """Return the diagonal blocks of a matrix whose size is a multiple of the block."""
    return torch.stack([matrix[a : a + block, a : a + block]
                        for a in range(0, len(matrix), block)])  # fmt: skip


def apart(found: Tensor, truth: Tensor) -> float:
    """Return the largest difference in units of the largest entry."""
    return float((found - truth).abs().max() / truth.abs().max())


def agrees(inverse: BlockInverse, truth: Tensor, tolerance: float) -> None:
    """Check everything that an inverse can be asked against the blocks (n, B, B) of the truth."""
    n, block = inverse.shape
    assert truth.shape == (n, block, block)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, block, generator=generator, dtype=torch.float64)
    wide = torch.randn(n, block, 2, generator=generator, dtype=torch.float64)
    assert apart(inverse.dense(), truth) <= tolerance
    assert apart(inverse.diagonal(), truth.diagonal(dim1=1, dim2=2)) <= tolerance
    assert apart(inverse.solve(v), (truth @ v[:, :, None])[:, :, 0]) <= tolerance
    assert apart(inverse.solve(wide), truth @ wide) <= tolerance
    chosen = torch.tensor([0, n * block - 1, (n - 1) * block])
    columns = torch.stack([truth[q // block, :, q % block] for q in chosen])
    assert apart(inverse.columns(chosen), columns) <= tolerance
    if block % 2 == 0:
        pairs_ = torch.stack([m for t in truth for m in blocks_of(t, 2)])
        assert apart(inverse.groups(2).flatten(0, 1), pairs_) <= tolerance
    if block > 2:
        sets = torch.tensor([[0, 2], [block * n - 1, block * n - 3]])
        subs = [truth[q[0] // block][q % block][:, q % block] for q in sets]
        assert apart(inverse.sub(sets), torch.stack(subs)) <= tolerance
    # F F⁻¹ = I costs what the condition costs, whatever the route
    back = inverse.times(inverse.solve(v))
    assert apart(back, v) <= 1e3 * tolerance


@pytest.mark.parametrize("damping", [10.0**-k for k in range(1, 8)])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("samples", "block"), [(37, 10), (7, 10), (37, 30), (7, 30), (1, 6)])
def test_every_route_is_the_dense_inverse(
    route: Route, damping: float, samples: int, block: int
) -> None:
    x = rows(mlp(6, 5, 3), pairs(samples, 6, 3))  # 30 weights
    truth = torch.linalg.inv(dense_fisher(x, block, damping))
    agrees(invert(x, block, damping, route=route), blocks_of(truth, block), TRUTH)


@settings(deadline=None, max_examples=40)
@given(shapes, dampings, st.sampled_from(ROUTES))
def test_any_shape_and_damping(
    shape: tuple[int, int, int, int], damping: float, route: Route
) -> None:
    samples, size, block, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    block = min(block, size)
    whole = torch.nn.functional.pad(x, (0, -size % block))
    fisher = dense_fisher(whole, block, damping)
    truth = blocks_of(torch.linalg.inv(fisher), block)
    # float64's rounding times λ_max/λ: what the truth loses, and what 1/λ − … cancels
    lost = 1e-14 * float(torch.linalg.eigvalsh(fisher)[-1]) / damping + 1e-12
    inverse = invert(x, block, damping, route=route)
    assert apart(inverse.dense(), truth) <= lost
    assert apart(inverse.diagonal(), truth.diagonal(dim1=1, dim2=2)) <= lost


@pytest.mark.parametrize("route", [*ROUTES, "diagonal"])
def test_order_and_copies_of_samples_change_nothing(route: Route) -> None:
    x = rows(mlp(6, 5, 3), pairs(11, 6, 3))
    block = 1 if route == "diagonal" else 10
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    reference = invert(x, block, 1e-2, route=route).dense()
    for other in (x[order], torch.cat([x, x]), x.repeat_interleave(3, 0)):
        found = invert(other, block, 1e-2, route=route).dense()
        torch.testing.assert_close(found, reference, rtol=1e-11, atol=0)  # sums in another order


@pytest.mark.parametrize("route", ROUTES)
def test_large_damping_ranks_by_magnitude(route: Route) -> None:
    model = mlp(6, 5, 3)
    w = model[0].weight.detach().view(3, 10)
    x = rows(model, pairs(11, 6, 3))
    large = statistic(invert(x, 10, 1e9, route=route), w).flatten()
    assert torch.equal(large.argsort(), w.flatten().abs().argsort())
    small = statistic(invert(x, 10, 1e-6, route=route), w).flatten()
    assert not torch.equal(small.argsort(), w.flatten().abs().argsort())


@pytest.mark.parametrize("route", [*ROUTES, "diagonal"])
def test_blocks_of_one_weight_are_the_diagonal_fisher(route: Route) -> None:
    model = mlp(6, 5, 3)
    w = model[0].weight.detach().flatten()
    x = rows(model, pairs(11, 6, 3))
    expected = w.square() * (0.03 + x.square().mean(0)) / 2
    found = statistic(invert(x, 1, 0.03, route=route), w[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)  # exact but for rounding


@pytest.mark.parametrize("route", ROUTES)
def test_fixed_weights_are_no_part_of_the_inverse(route: Route) -> None:
    x = rows(mlp(6, 5, 3), pairs(11, 6, 3))
    kept = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.6
    inverse = invert(x, 10, 1e-2, route=route).restricted(kept)
    for k, (stays, found) in enumerate(zip(kept, inverse.dense(), strict=True)):
        part = x[:, 10 * k : 10 * k + 10][:, stays]
        truth = torch.linalg.inv(dense_fisher(part, 10, 1e-2))
        torch.testing.assert_close(found[stays][:, stays], truth, rtol=1e-10, atol=1e-10)
        assert not found[stays][:, ~stays].any()


def test_routes_are_chosen_by_size() -> None:
    assert [choose(m, b) for m, b in [(256, 50), (50, 50), (49, 50), (3, 1)]] == [
        "gram", "gram", "samples", "diagonal",
    ]  # fmt: skip
    assert {choose(5, 3), "samples", "rank-one", "diagonal"} == set(get_args(Route))


def test_damping_is_relative_by_default() -> None:
    assert Damping().of(3.0) == pytest.approx(0.3)
    assert Damping(1e-7, relative=False).of(3.0) == 1e-7
    assert Damping().of(0.0) > 0
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="damping must be positive"):
            Damping(bad)


def test_a_damping_below_rounding_is_an_error() -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    indefinite = x.T @ x / 2 - 1e-3 * torch.eye(3).double()  # as rounding leaves it in float32
    with pytest.raises(SlimfuseError, match="raise the damping"):
        GramInverse(indefinite[None], 1e-9).diagonal()


def test_the_check_sees_a_wrong_inverse() -> None:
    x = rows(mlp(6, 5, 3), pairs(11, 6, 3))
    truth = blocks_of(torch.linalg.inv(dense_fisher(x, 10, 1e-3)), 10)
    with pytest.raises(AssertionError):
        agrees(invert(x, 10, 1.001e-3), truth, TRUTH)
