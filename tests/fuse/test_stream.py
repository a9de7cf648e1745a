"""The one map of the residual stream, against the rows it was made from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimfuse.fuse.stream import StreamMethod, centring, consensus, pivots, stream_map
from slimfuse.transport import Solver

CLOSE = {"rtol": 1e-8, "atol": 1e-9}  # float64, condition numbers below 1e4
METHODS: tuple[StreamMethod, ...] = ("pca", "select", "ot", "cluster")
N, WIDE, NARROW = 211, 11, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(width: int = WIDE, seed: int = 0) -> Tensor:
    """Return channel-centred rows with decaying directions."""
    decay = torch.linspace(1, 0.1, width).double()
    return (normal(N, width, seed=seed) * decay) @ normal(width, width, seed=9) @ centring(width)


def second(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def test_energy_is_the_share_of_the_squared_singular_values() -> None:
    y = rows()
    want = torch.linalg.svdvals(y).square()
    found = stream_map(second(y), NARROW, "pca").energy
    torch.testing.assert_close(found, want / want.sum(), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_kept_is_what_reading_back_the_rows_keeps(method: StreamMethod) -> None:
    y = rows()
    found = stream_map(second(y), NARROW, method)
    assert found.encode.shape == (NARROW, WIDE) and found.decode.shape == (WIDE, NARROW)
    left = y - y @ found.encode.T @ found.decode.T
    want = 1 - float(left.square().sum() / y.square().sum())
    assert found.kept == pytest.approx(want, rel=1e-9)
    assert 0.3 < found.kept < 1


@pytest.mark.parametrize("method", METHODS)
def test_no_linear_reading_is_better_than_decode(method: StreamMethod) -> None:
    y = rows()
    found = stream_map(second(y), NARROW, method)
    z = y @ found.encode.T
    best = z @ torch.linalg.lstsq(z, y, driver="gelsd", rcond=1e-10).solution
    torch.testing.assert_close(z @ found.decode.T, best, **CLOSE)


def test_pca_leaves_the_all_ones_direction_empty_and_keeps_the_top_of_the_rest() -> None:
    y = rows()
    found = stream_map(second(y), NARROW, "pca")
    torch.testing.assert_close(found.encode.sum(0), torch.zeros(WIDE).double(), **CLOSE)
    gram = found.encode @ found.encode.T
    torch.testing.assert_close(gram, centring(NARROW), **CLOSE)  # orthonormal but for the ones
    assert found.kept == pytest.approx(float(found.energy[: NARROW - 1].sum()), rel=1e-9)


def test_pca_keeps_at_least_as_much_as_any_other_method_of_its_rank() -> None:
    y = rows()
    best = stream_map(second(y), NARROW, "pca").kept
    for method in METHODS[1:]:
        assert stream_map(second(y), NARROW - 1, method).kept <= best


def test_pca_at_full_width_loses_nothing() -> None:
    found = stream_map(second(rows()), WIDE, "pca")
    assert found.kept == pytest.approx(1, abs=1e-12)  # float64: the rows have rank WIDE - 1


def test_select_takes_channels_as_they_are() -> None:
    y = rows()
    found = stream_map(second(y), NARROW, "select")
    chosen = pivots(second(y), NARROW)
    assert chosen == sorted(set(chosen))
    torch.testing.assert_close(y @ found.encode.T, y[:, chosen], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ot", "cluster"])
def test_copies_of_a_channel_are_merged(method: StreamMethod) -> None:
    owner = torch.randperm(WIDE, generator=torch.Generator().manual_seed(1)) % NARROW
    y = rows(NARROW)[:, owner]
    found = stream_map(second(y), NARROW, method)
    assert found.plan is not None
    assert found.kept == pytest.approx(1, abs=1e-9)  # float64, pseudo-inverse cut at 1e-9
    torch.testing.assert_close(found.plan.push.sum(0), torch.ones(NARROW).double(), **CLOSE)


def test_a_regulariser_softens_the_plan() -> None:
    y = rows()
    hard = stream_map(second(y), NARROW, "ot").plan
    soft = stream_map(second(y), NARROW, "ot", solver=Solver("sinkhorn", reg=1.0)).plan
    assert hard is not None and soft is not None
    assert soft.effective_units > 1.5 * hard.effective_units


def joint(*streams: Tensor) -> Tensor:
    """Return E[x xᵀ / |P x_1|²] of concatenated streams."""
    norm = (streams[0] @ centring(streams[0].shape[1])).square().sum(1, keepdim=True).sqrt()
    return second(torch.cat(streams, dim=1) / norm)


def rotation(width: int) -> Tensor:
    """Return a rotation that leaves the all-ones direction alone."""
    basis = torch.linalg.qr(centring(width)[:, 1:])[0]
    turn = torch.linalg.qr(normal(width - 1, width - 1, seed=3))[0]
    return basis @ turn @ basis.T + 1 / width


def test_the_consensus_of_a_rotated_copy_recovers_the_rotation() -> None:
    x = rows()
    turn = rotation(WIDE)
    found = consensus(joint(x, x @ turn.T), [WIDE, WIDE], [1.0, 1.0])
    torch.testing.assert_close(2 * found.mixes[1], turn.T @ centring(WIDE), **CLOSE)
    torch.testing.assert_close(found.readbacks[1], turn @ centring(WIDE), **CLOSE)
    torch.testing.assert_close(found.second, joint(x), **CLOSE)  # it is the anchor's own stream
    assert found.agreement == pytest.approx((1, 1), abs=1e-9)


def test_a_channel_mean_changes_nothing() -> None:
    x = rows()
    shifted = x + normal(N, 1, seed=7)
    a = consensus(joint(x, x), [WIDE, WIDE], [1.0, 1.0])
    b = consensus(joint(shifted, shifted), [WIDE, WIDE], [1.0, 1.0])
    torch.testing.assert_close(a.second, b.second, **CLOSE)


def test_a_wider_parent_is_read_into_the_anchors_coordinates() -> None:
    x = rows()
    wide = x @ normal(WIDE, 17, seed=4) @ centring(17)
    found = consensus(joint(x, wide), [WIDE, 17], [3.0, 1.0])
    torch.testing.assert_close(4 * wide @ found.mixes[1].T, x, rtol=1e-6, atol=1e-7)  # condition²
    torch.testing.assert_close(x @ found.readbacks[1].T, wide, rtol=1e-6, atol=1e-7)
    assert found.agreement[1] == pytest.approx(1, abs=1e-7)


def test_agreement_is_the_share_a_linear_reading_explains() -> None:
    x, other = rows(), rows(seed=1)
    half = 0.7 * x + 0.7 * other
    found = consensus(joint(x, half), [WIDE, WIDE], [1.0, 1.0])
    scale = x.square().sum(1, keepdim=True).sqrt()
    a, b = x / scale, half / scale
    read = b @ torch.linalg.lstsq(b, a, driver="gelsd", rcond=1e-10).solution
    want = float(read.square().sum() / a.square().sum())
    assert found.agreement[1] == pytest.approx(want, rel=1e-8)
    assert 0.1 < want < 0.9


def test_shares_weigh_the_parents() -> None:
    x = rows()
    found = consensus(joint(x, x), [WIDE, WIDE], [3.0, 1.0])
    torch.testing.assert_close(found.mixes[0], 0.75 * centring(WIDE), **CLOSE)
    torch.testing.assert_close(found.mixes[1], 0.25 * centring(WIDE), **CLOSE)


def test_a_parent_that_agrees_poorly_weighs_the_square_of_its_agreement() -> None:
    x, other = rows(), rows(seed=1)
    half = 0.7 * x + 0.7 * other
    found = consensus(joint(x, half), [WIDE, WIDE], [2.0, 3.0])
    share = found.agreement[1]
    assert found.agreement[0] == pytest.approx(1, abs=1e-12) and share < 0.9
    total = 2 + 3 * share**2
    torch.testing.assert_close(found.mixes[0], 2 / total * centring(WIDE), **CLOSE)
    scale = x.square().sum(1, keepdim=True).sqrt()
    read = torch.linalg.lstsq(half / scale, x / scale, driver="gelsd", rcond=1e-10).solution.T
    torch.testing.assert_close(found.mixes[1], 3 * share**2 / total * read, **CLOSE)
