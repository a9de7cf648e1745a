"""The faithful mode: exactly widened and permuted copies come back, and where they can't.

Copies are fused with `anchor_weight=0` unless a test says otherwise: the anchor's own weights would
hide errors.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from fuse.copies import (
    ALGEBRA,
    EVERY,
    FUSED,
    GROWN,
    HEADS,
    QKS,
    RESIDUALS,
    WRONG,
    error,
    fused,
    permuted,
    widened,
)
from tiny import duplicate, maps_of, moved, random_vit

from slimfuse.fuse import transport_move
from slimfuse.spaces import LinearMap

COSTS = ("activations", "weights", "combined")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cost", COSTS)
def test_a_copy_widened_in_every_space_comes_back_under_every_policy(
    vit: Any, heads: str, cost: str
) -> None:
    wide = widened(vit)
    # both costs alone are right at every point of the grid: their sum is spot-checked
    pairs = zip(RESIDUALS, QKS * 2, strict=False) if cost == "combined" else ()
    for residual, qk in pairs or product(RESIDUALS, QKS):
        got = error([wide], vit, residual=residual, qk=qk, heads=heads, cost=cost)
        assert got < FUSED, (residual, qk, got)


@pytest.mark.parametrize("space", ["resid", "head", "qk", "mlp"])
def test_a_copy_widened_in_one_space_comes_back(vit: Any, space: str) -> None:
    wide = widened(vit, space)
    for residual, (qk, (heads, cost)) in zip(
        RESIDUALS, zip(QKS * 2, product(HEADS, COSTS), strict=True), strict=False
    ):
        assert error([wide], vit, residual=residual, qk=qk, heads=heads, cost=cost) < FUSED


@pytest.mark.parametrize("masses", ["norm", "saliency"])
@pytest.mark.parametrize("heads", HEADS)
def test_a_widened_copy_comes_back_with_other_masses(vit: Any, masses: str, heads: str) -> None:
    for qk in QKS:
        assert error([widened(vit)], vit, masses=masses, heads=heads, qk=qk) < FUSED


@pytest.mark.parametrize("tokens", ["class", "window"])
def test_a_widened_copy_comes_back_from_some_tokens(vit: Any, tokens: str) -> None:
    assert error([widened(vit)], vit, tokens=tokens) < FUSED
    assert error([widened(vit)], vit, tokens=tokens, window=0, residual="none") < FUSED


def test_a_narrow_parent_comes_back_as_its_own_widened_copy(vit: Any) -> None:
    for heads, cost in product(HEADS, COSTS):
        assert error([vit], widened(vit), heads=heads, cost=cost) < FUSED


@pytest.mark.parametrize("space", EVERY)
def test_a_copy_permuted_in_one_space_comes_back(vit: Any, space: str) -> None:
    copy = permuted(vit, (space,))
    assert error([copy], vit) < FUSED
    assert error([copy], vit, cost="weights", heads="crossed", residual="none") < FUSED


@pytest.mark.parametrize("weight", [None, 0.0, 0.3])
def test_two_copies_of_different_width_come_back(vit: Any, weight: float | None) -> None:
    parents = [permuted(vit), permuted(widened(vit), seed=3)]
    for residual in RESIDUALS if weight is None else ("mean",):
        assert error(parents, vit, anchor_weight=weight, residual=residual) < FUSED


def test_a_model_fused_with_itself_is_itself(vit: Any) -> None:
    for residual, qk in zip(RESIDUALS, QKS * 2, strict=False):
        target, _ = fused([vit, vit], vit, residual=residual, qk=qk, anchor_weight=None)
        for name, value in target.state_dict().items():
            torch.testing.assert_close(value, vit.state_dict()[name], **ALGEBRA)


def test_a_model_without_query_key_and_value_biases_comes_back() -> None:
    plain = random_vit(qkv_bias=False)
    wide = moved(
        plain, maps_of(plain, EVERY, lambda n, _seed: duplicate(n)), **GROWN["all"], qkv_bias=False
    )
    assert error([wide], plain, cost="combined") < FUSED


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_random_parent_does_not_come_back_as_the_anchor(vit: Any, residual: str) -> None:
    assert error([random_vit(seed=5)], vit, residual=residual) > WRONG
    assert error([widened(random_vit(seed=5))], vit, residual=residual) > WRONG


@pytest.mark.parametrize("space", list(GROWN))
def test_swapping_push_and_pull_is_seen(
    vit: Any, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = transport_move.transform

    def swapped(state: Any, atlas: Any, maps: Any, **kwargs: Any) -> Any:
        return right(
            state, atlas, {k: LinearMap(m.pull, m.push) for k, m in maps.items()}, **kwargs
        )

    monkeypatch.setattr(transport_move, "transform", swapped)
    # a stream that is too large by one factor, read by as much less, is the same function: only
    # the mean with the anchor tells
    assert error([widened(vit, space)], vit, anchor_weight=0.5) > WRONG


@pytest.mark.parametrize("heads", HEADS)
def test_keys_moved_by_the_plain_pull_are_seen(
    vit: Any, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_move, "key_side", lambda tmap, _heads: tmap.pull)
    assert error([widened(vit, "qk")], vit, heads=heads) < FUSED  # one head stands for one
    assert error([widened(vit, "head")], vit, heads=heads) > WRONG
