"""Reduction in closed form: exact where what is dropped is redundant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import images, logits, random_vit, vit_config
from torch import Tensor, nn

from slimfuse.errors import ShapeError
from slimfuse.families import ViT
from slimfuse.fuse.canonical import canonical, write
from slimfuse.fuse.gauge_reduce import complement, narrowing, reduce
from slimfuse.spaces import LinearMap, NestedMap, transform

FAMILY = ViT()
NARROW = {"hidden_size": 9, "num_attention_heads": 3, "intermediate_size": 13}
WIDE = {"hidden_size": 15, "num_attention_heads": 4, "intermediate_size": 19, "head_dim": 5}
# LayerNorm's ε is 1e-12 of a variance of order 1 and doesn't grow with the width; the rest is
# rounding over the smallest kept singular values of random moments
PLANTED = {"rtol": 0, "atol": 1e-7}


def isometry(rows: int, columns: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(columns, rows, generator=g, dtype=torch.float64)).Q.T


def copies(size: int, count: int) -> LinearMap:
    """Return the map onto `count` units where the first ones stand twice and are read by halves."""
    eye = torch.eye(size, dtype=torch.float64)
    push = torch.cat([eye, eye[:, : count - size]], dim=1)
    return LinearMap(push, push / push.sum(1, keepdim=True))


def planted(narrow: nn.Module, only: tuple[str, ...] = ("resid", "head", "qk", "mlp")) -> nn.Module:
    """Return a wider model of the same function: its stream lives in 8 of 15 dimensions, heads
    and units stand twice, and heads use 3 of their 5 units."""
    d, m = 15, 9
    spread = complement(m) @ isometry(m - 1, d - 1, 0) @ complement(d).T
    maps: dict[str, Any] = {}
    sizes = {**NARROW, "head_dim": 3}
    if "resid" in only:
        maps["resid"] = LinearMap(spread, spread * (m / d) ** 0.5)
        sizes["hidden_size"] = d
    for i in range(2):
        if "head" in only:
            maps[f"head.{i}"] = copies(3, 4)
            sizes["num_attention_heads"] = 4
        if "mlp" in only:
            maps[f"mlp.{i}"] = copies(13, 19)
            sizes["intermediate_size"] = 19
        if "qk" in only:
            for offset, space in enumerate(("qk", "vo")):
                inner = [isometry(3, 5, 10 * i + 100 * offset + h) for h in range(3)]
                maps[f"{space}.{i}"] = NestedMap([LinearMap(x, x) for x in inner])
            sizes["head_dim"] = 5
    state = transform(canonical(narrow, FAMILY), FAMILY.atlas(narrow.config), maps)
    wide = FAMILY.build(vit_config(qkv_bias=narrow.config.qkv_bias, **sizes)).double()
    for name in state:
        if "layernorm" in name and "resid" in only:
            state[name] = torch.full((d,), float("weight" in name), dtype=torch.float64)
        if "q_proj" in name:
            state[name] *= FAMILY.query_scale(narrow.config, wide.config)
    write(wide, state)
    return wide


@pytest.mark.parametrize("space", ["resid", "head", "qk", "mlp", "all"])
def test_planted_redundancy_is_removed_exactly(space: str) -> None:
    narrow = random_vit(1, **NARROW)
    wide = planted(narrow, ("resid", "head", "qk", "mlp") if space == "all" else (space,))
    x = images(5)
    # the planting itself is exact
    torch.testing.assert_close(logits(wide, x), logits(narrow, x), rtol=0, atol=1e-9)
    target = random_vit(2, **NARROW)
    found = reduce(wide, target, FAMILY, lambda: images(120).split(50))
    torch.testing.assert_close(logits(target, x), logits(narrow, x), **PLANTED)
    assert found.energy == pytest.approx(1, abs=1e-10)
    assert all(len(h) == 3 for h in found.heads) and all(len(u) == 13 for u in found.units)


@pytest.mark.parametrize("bias", [True, False])
def test_reducing_to_the_same_shape_keeps_the_logits(bias: bool) -> None:
    model, target = random_vit(3, qkv_bias=bias), random_vit(4, qkv_bias=bias)
    reduce(model, target, FAMILY, lambda: [images(60)])
    x = images(5)
    # rounding over the least variances that the decoders divide by
    torch.testing.assert_close(logits(target, x), logits(model, x), rtol=0, atol=1e-7)


def test_models_without_query_bias_narrow_too() -> None:
    """Their shift of ones stands for the bias and has to survive the narrower stream."""
    model, sizes = random_vit(5, qkv_bias=False), {**NARROW, "qkv_bias": False}
    target = random_vit(6, **sizes)
    x = images(40)
    reduce(model, target, FAMILY, lambda: [x])
    kept = float((logits(target, x) - logits(model, x)).norm() / logits(model, x).norm())
    other = random_vit(7, **sizes)
    random = float((logits(other, x) - logits(model, x)).norm() / logits(model, x).norm())
    assert kept < 0.7 * random


def test_narrowing_is_an_isometry_off_the_all_ones() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 11, generator=g, dtype=torch.float64)
    rows = rows - rows.mean(1, keepdim=True)
    second = rows.T @ rows / 40
    encode = narrowing(second, 7)
    torch.testing.assert_close(
        encode @ encode.T, torch.eye(7, dtype=torch.float64) - 1 / 7, rtol=0, atol=1e-12
    )
    for side in (encode.sum(0), encode.sum(1)):
        torch.testing.assert_close(side, torch.zeros_like(side), rtol=0, atol=1e-12)
    kept = torch.linalg.eigvalsh(second).flip(0)[:6].sum()  # Eckart and Young
    assert float((encode @ second @ encode.T).trace()) == pytest.approx(float(kept), rel=1e-12)
    low = narrowing(torch.outer(rows[0], rows[0]), 11)  # most directions are never used
    torch.testing.assert_close(low @ low.T, torch.eye(11, dtype=torch.float64) - 1 / 11)


def test_a_target_of_another_depth_is_told() -> None:
    shallow = random_vit(8, **NARROW, num_hidden_layers=1)
    with pytest.raises(ShapeError, match="as deep as"):
        reduce(random_vit(9), shallow, FAMILY, lambda: [images(4)])


def test_the_planted_test_sees_a_wrong_scale() -> None:
    narrow = random_vit(1, **NARROW)
    wide = planted(narrow, ("resid",))
    target = random_vit(2, **NARROW)
    reduce(wide, target, FAMILY, lambda: [images(60)])
    with torch.no_grad():
        for layer in target.vit.layers:
            layer.mlp.fc1.weight *= (15 / 9) ** 0.5
    x = images(5)
    assert float((logits(target, x) - logits(narrow, x)).abs().max()) > 1e-3
