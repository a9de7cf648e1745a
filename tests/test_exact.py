"""Exactness in float64: what must come back from a permuted or a widened copy, and does.

A permutation is blind to a wrong role (push for pull) and sees a wrong space; a duplication the
reverse. So every space goes through both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import duplicate, images, logits, maps_of, moved, permute, random_vit, reverse

from slimfuse.families import ViT
from slimfuse.fuse.refit import Parent, Settings, refit
from slimfuse.spaces import NestedMap, Role, transform

# what the config has to say when a space doubles; head_dim lets each space double on its own
GROWN = {
    "resid": {"hidden_size": 30, "head_dim": 5},
    "head": {"num_attention_heads": 6, "head_dim": 5},
    "qk": {"head_dim": 10},
    "mlp": {"intermediate_size": 34},
}
SPACES = {"resid": ("resid",), "head": ("head",), "qk": ("qk", "vo"), "mlp": ("mlp",)}
ALGEBRA = {"rtol": 0, "atol": 1e-10}  # float64, exact identity; logits are of order 1
FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-9


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def back(maps: dict[str, Any]) -> dict[str, Any]:
    return {
        k: NestedMap([reverse(m) for m in v.inner]) if isinstance(v, NestedMap) else reverse(v)
        for k, v in maps.items()
    }


@pytest.mark.parametrize("space", ["resid", "head", "qk", "vo", "mlp"])
def test_permuting_a_space_keeps_the_logits(vit: Any, space: str) -> None:
    x = images(5)
    twisted = moved(vit, maps_of(vit, (space,), permute))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(vit.state_dict().values(), twisted.state_dict().values(), strict=True)
    )
    torch.testing.assert_close(logits(twisted, x), logits(vit, x), **ALGEBRA)


@pytest.mark.parametrize("space", list(SPACES))
def test_duplicating_a_space_and_narrowing_it_again_keep_the_logits(vit: Any, space: str) -> None:
    x = images(5)
    maps = maps_of(vit, SPACES[space], lambda n, _seed: duplicate(n))
    wide = moved(vit, maps, **GROWN[space])
    torch.testing.assert_close(logits(wide, x), logits(vit, x), **ALGEBRA)
    if space == "qk":  # one inner map per source head, as many heads as before
        maps = {k: NestedMap(v.inner) for k, v in maps.items()}
    family = ViT()
    state = transform(wide.state_dict(), family.atlas(wide.config), back(maps))
    for name in state:
        if "q_proj" in name:
            state[name] *= family.query_scale(wide.config, vit.config)
    for name, value in vit.state_dict().items():
        torch.testing.assert_close(state[name], value, **ALGEBRA)


def test_every_leg_is_moved_by_both_tests(vit: Any) -> None:
    atlas = ViT().atlas(vit.config)
    covered = {s for names in SPACES.values() for s in names}
    assert {name.split(".")[0] for name in atlas.free} == covered
    for name in atlas.free:
        assert atlas.users(name, Role.WRITE) and atlas.users(name, Role.READ)


@pytest.mark.parametrize("wrong", ["resid", "head", "qk", "vo", "mlp"])
def test_the_duplication_test_sees_a_wrong_role(vit: Any, wrong: str) -> None:
    space = "qk" if wrong == "vo" else wrong
    maps = maps_of(vit, SPACES[space], lambda n, _seed: duplicate(n))

    class Swapped:
        def __init__(self, inner: Any) -> None:
            self.push, self.pull = inner.push, inner.push  # one matrix for both sides

    bad = {
        k: (NestedMap([Swapped(m) for m in v.inner]) if isinstance(v, NestedMap) else Swapped(v))
        if k.split(".")[0] == wrong
        else v
        for k, v in maps.items()
    }
    x = images(5)
    assert gap(logits(moved(vit, bad, **GROWN[space]), x), logits(vit, x)) > 0.01


def fuse(parents: list[Any], config: Any, n: int = 48, **settings: Any) -> Any:
    family = ViT()
    target = family.build(config).double()
    x = images(n, seed=7)
    refit(
        [Parent(f"p{i}", m) for i, m in enumerate(parents)],
        target,
        family,
        lambda: x.split(16),
        Settings(**settings),
        n_batches=n // 16,
    )
    return target


@pytest.mark.parametrize("stream", ["pca", "select", "ot", "cluster"])
def test_self_fusion_at_equal_width_is_the_parent(vit: Any, stream: str) -> None:
    x = images(9)
    assert gap(logits(fuse([vit], vit.config, stream=stream), x), logits(vit, x)) < FUSED


def test_self_fusion_without_query_key_and_value_biases() -> None:
    plain = random_vit(qkv_bias=False)
    x = images(9)
    assert gap(logits(fuse([plain], plain.config), x), logits(plain, x)) < FUSED


@pytest.mark.parametrize("space", ["resid", "head", "qk", "vo", "mlp"])
def test_fusing_undoes_a_permuted_copy(vit: Any, space: str) -> None:
    copy = moved(vit, maps_of(vit, (space,), permute))
    x = images(9)
    assert gap(logits(fuse([vit, copy], vit.config), x), logits(vit, x)) < FUSED


def test_fusing_undoes_a_copy_permuted_in_every_space(vit: Any) -> None:
    copy = moved(vit, maps_of(vit, ("resid", "head", "qk", "vo", "mlp"), permute))
    x = images(9)
    assert gap(logits(fuse([copy, vit], vit.config), x), logits(vit, x)) < FUSED


@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize("stream", ["pca", "select", "ot", "cluster"])
def test_fusing_undoes_a_widened_copy(vit: Any, space: str, stream: str) -> None:
    wide = moved(vit, maps_of(vit, SPACES[space], lambda n, _seed: duplicate(n)), **GROWN[space])
    x = images(9)
    assert gap(logits(fuse([wide], vit.config, stream=stream), x), logits(vit, x)) < FUSED


def test_fusing_parents_of_different_width_that_are_one_function() -> None:
    small = random_vit()
    wide = moved(
        small,
        maps_of(small, ("resid", "head", "mlp"), lambda n, _seed: duplicate(n)),
        hidden_size=30, num_attention_heads=6, intermediate_size=34,
    )  # fmt: skip
    x = images(9)
    assert gap(logits(fuse([wide, small], small.config), x), logits(small, x)) < FUSED


def test_a_random_parent_gives_its_own_function_not_the_trained_one(vit: Any) -> None:
    other = random_vit(seed=5)
    x = images(9)
    fused = fuse([other], vit.config)
    assert gap(logits(fused, x), logits(other, x)) < FUSED
    assert gap(logits(fused, x), logits(vit, x)) > 0.1
