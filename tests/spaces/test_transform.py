"""Moving weights, against explicit Kronecker and block matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimfuse.spaces import Atlas, LinearMap, NestedMap, Space, identity, transform
from slimfuse.spaces.transform import axis_matrix

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of at most 35 products of order 1
HEADS, UNITS, RESID, MLP = 3, 5, 7, 11
SPACES = [
    Space("resid", RESID, "stream"),
    Space("head", HEADS, "head"),
    Space("qk", UNITS, "qk"),
    Space("mlp", MLP, "mlp"),
    Space("rows", 2, "fixed"),
]
ATLAS = Atlas.declare(
    {
        "up": "^mlp _resid",
        "bias": "^mlp",
        "conv": "^resid =rows =rows",
        "keys": "(^head _qk) _resid",
        "out": "^resid (_head _qk)",
    },
    SPACES,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(n: int, m: int, seed: int) -> LinearMap:
    return LinearMap(normal(n, m, seed=seed), normal(n, m, seed=seed + 1000))


def state() -> dict[str, Tensor]:
    return {n: normal(*ATLAS.shape(n), seed=i) for i, n in enumerate(ATLAS.axes)}


def test_writers_go_through_push_and_readers_through_pull() -> None:
    mlp, resid = linear(MLP, 4, 1), linear(RESID, 6, 2)
    weights = state()
    moved = transform(weights, ATLAS, {"mlp": mlp, "resid": resid})
    torch.testing.assert_close(moved["up"], mlp.push.T @ weights["up"] @ resid.pull, **EXACT)
    torch.testing.assert_close(moved["bias"], mlp.push.T @ weights["bias"], **EXACT)


def test_other_axes_stay_in_their_place() -> None:
    resid = linear(RESID, 6, 2)
    weights = state()
    moved = transform(weights, ATLAS, {"resid": resid})["conv"]
    assert moved.shape == (6, 2, 2)
    want = torch.stack(
        [
            torch.stack([resid.push.T @ weights["conv"][:, i, j] for j in range(2)], dim=1)
            for i in range(2)
        ],
        dim=1,
    )
    torch.testing.assert_close(moved, want, **EXACT)


def test_two_spaces_of_a_flattened_axis_are_a_kronecker_product() -> None:
    head, units = linear(HEADS, 2, 3), linear(UNITS, 4, 4)
    weights = state()
    moved = transform(weights, ATLAS, {"head": head, "qk": units})
    # keys write their head and read qk; out reads both
    keys = torch.kron(head.push, units.pull)
    out = torch.kron(head.pull, units.pull)
    torch.testing.assert_close(moved["keys"], keys.T @ weights["keys"], **EXACT)
    torch.testing.assert_close(moved["out"], weights["out"] @ out, **EXACT)


def test_a_space_without_a_map_stays_inside_a_flattened_axis() -> None:
    head = linear(HEADS, 2, 3)
    weights = state()
    want = torch.kron(head.push, torch.eye(UNITS).double()).T @ weights["keys"]
    torch.testing.assert_close(transform(weights, ATLAS, {"head": head})["keys"], want, **EXACT)


def test_a_nested_map_is_a_block_matrix_with_one_block_a_head() -> None:
    head = linear(HEADS, 2, 3)
    inner = [linear(UNITS, 4, 10 + h) for h in range(HEADS)]
    weights = state()
    moved = transform(weights, ATLAS, {"head": head, "qk": NestedMap(inner)})
    dense = torch.cat(
        [
            torch.cat([head.push[h, g] * inner[h].pull for g in range(2)], dim=1)
            for h in range(HEADS)
        ]
    )
    torch.testing.assert_close(moved["keys"], dense.T @ weights["keys"], **EXACT)


def test_a_nested_map_of_unmoved_heads_is_block_diagonal() -> None:
    inner = [linear(UNITS, 4, 10 + h) for h in range(HEADS)]
    dense = torch.block_diag(*(m.pull for m in inner))
    matrix = axis_matrix(ATLAS.axes["keys"][0], ATLAS, {"qk": NestedMap(inner)})
    torch.testing.assert_close(matrix, dense, rtol=0, atol=0)  # copies, no arithmetic


def test_equal_inner_maps_are_the_plain_map() -> None:
    units = linear(UNITS, 4, 4)
    axis = ATLAS.axes["out"][1]
    head = linear(HEADS, 2, 3)
    nested = axis_matrix(axis, ATLAS, {"head": head, "qk": NestedMap([units] * HEADS)})
    torch.testing.assert_close(
        nested, axis_matrix(axis, ATLAS, {"head": head, "qk": units}), **EXACT
    )


def test_a_joint_map_moves_a_flattened_axis_as_a_whole() -> None:
    joint = linear(HEADS * UNITS, 8, 5)
    weights = state()
    moved = transform(weights, ATLAS, {"head qk": joint}, only=["out"])
    assert list(moved) == ["out"]
    torch.testing.assert_close(moved["out"], weights["out"] @ joint.pull, **EXACT)


def test_a_joint_map_cant_move_two_roles() -> None:
    with pytest.raises(AssertionError, match="one role"):
        transform(state(), ATLAS, {"head qk": linear(HEADS * UNITS, 8, 5)}, only=["keys"])


def test_a_nested_map_needs_one_inner_map_a_head() -> None:
    with pytest.raises(AssertionError, match="one inner map per outer unit"):
        transform(state(), ATLAS, {"qk": NestedMap([linear(UNITS, 4, 1)] * (HEADS + 1))})


def test_identities_and_no_maps_change_nothing() -> None:
    weights = state()
    for maps in ({}, {"resid": identity(RESID), "qk": NestedMap([identity(UNITS)] * HEADS)}):
        for name, value in transform(weights, ATLAS, maps).items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0)  # x · 1 + y · 0


def test_the_dtype_of_the_weights_stays_and_sums_run_in_float64() -> None:
    weights = {k: v.float() for k, v in state().items()}
    maps = {"mlp": linear(MLP, 4, 1), "resid": linear(RESID, 6, 2)}
    moved = transform(weights, ATLAS, maps)["up"]
    assert moved.dtype == torch.float32
    double = transform({k: v.double() for k, v in weights.items()}, ATLAS, maps)["up"]
    torch.testing.assert_close(moved, double.float(), rtol=0, atol=0)  # one rounding, at the end
