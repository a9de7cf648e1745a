"""The parts of the faithful mode: means, maps, costs, tokens, heads."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from fuse.copies import (
    ALGEBRA,
    FUSED,
    RESIDUALS,
    fused,
    gap,
    widened,
)
from tiny import images, logits, random_vit
from torch import Tensor

from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import ViT
from slimfuse.fuse.transport import TransportSettings, fuse_by_transport
from slimfuse.fuse.transport_heads import (
    contribution_similarity,
    key_side,
    match_heads,
    units_in_heads,
    weight_similarity,
)
from slimfuse.fuse.transport_policies import after_addition, kept_tokens
from slimfuse.fuse.union import Parent
from slimfuse.moments import Moments
from slimfuse.spaces import NestedMap
from slimfuse.spaces.transform import axis_matrix
from slimfuse.transport import Solver, solve, uniform


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_fused_weights_are_the_weighted_mean(vit: Any) -> None:
    other = random_vit(seed=5, hidden_size=20, num_attention_heads=4, intermediate_size=11)
    alone = [fused([p], vit)[0].state_dict() for p in (other, random_vit(seed=6))]
    both, result = fused([other, random_vit(seed=6)], vit, anchor_weight=0.4)
    assert result.weights == pytest.approx((0.4, 0.3, 0.3))
    for name, value in both.state_dict().items():
        want = 0.4 * vit.state_dict()[name] + 0.3 * alone[0][name] + 0.3 * alone[1][name]
        torch.testing.assert_close(value, want, **ALGEBRA)
    assert fused([vit, vit], vit, anchor_weight=None)[1].weights == pytest.approx((1 / 3,) * 3)


def test_every_map_is_told(vit: Any) -> None:
    _, result = fused([widened(vit), vit], vit, qk="separate")
    names = ["stream.0"]
    for i in range(2):
        names += [f"heads.{i}", f"vo.{i}", f"q.{i}", f"k.{i}", f"attention.{i}"]
        names += [f"stream.{2 * i + 1}", f"mlp.{i}", f"mlp-out.{i}", f"stream.{2 * i + 2}"]
    assert [(m.parent, m.name) for m in result.maps] == list(product(["p0", "p1"], names))
    assert all(m.converged and m.marginal_error < 1e-9 for m in result.maps)
    copies = {"vo": 4.0, "q": 4.0, "k": 4.0}  # two heads of two copies; else two copies
    for m in result.maps:
        want = copies.get(m.name.split(".")[0], 2.0) if m.parent == "p0" else 1.0
        assert m.effective_units == pytest.approx(want)


def test_weight_costs_run_no_model(vit: Any) -> None:
    def never() -> Any:
        raise AssertionError("no batch should be asked for")
        yield

    target = ViT().build(vit.config).double()
    settings = TransportSettings(cost="weights", anchor_weight=0.0)
    fuse_by_transport([Parent("p", widened(vit))], vit, target, ViT(), never, settings, n_batches=3)
    assert gap(logits(target, images(9)), logits(vit, images(9))) < FUSED


@pytest.mark.parametrize("policy", RESIDUALS)
def test_the_streams_map_after_an_addition(policy: Any) -> None:
    skip, branch = (solve(random(4, 3, seed=s).square()) for s in (1, 2))
    x, y = torch.tensor([3.0, 4.0, 0.0]).double(), torch.tensor([1.0, 4.0, 12.0]).double()
    share = {
        "none": [0, 0, 0], "residual-only": [1, 1, 1], "mean": [0.5, 0.5, 0.5],
        "weighted-scalar": [5 / (5 + 161**0.5)] * 3, "weighted-matrix": [3 / 4, 4 / 8, 0],
    }[policy]  # fmt: skip
    got = after_addition(policy, skip, branch, x, y)
    for j, gamma in enumerate(share):
        want = gamma * skip.plan[:, j] + (1 - gamma) * branch.plan[:, j]
        torch.testing.assert_close(got.plan[:, j], want, **ALGEBRA)
    torch.testing.assert_close(got.push.sum(0), torch.ones(3).double(), **ALGEBRA)
    torch.testing.assert_close(got.pull.sum(1), torch.ones(4).double(), **ALGEBRA)


def test_tokens_that_count() -> None:
    text, config = object(), random_vit().config
    assert kept_tokens("all", 9, 5, 0, text).tolist() == [0, 1, 2, 3, 4]
    assert kept_tokens("class", 9, 5, -1, text).tolist() == [4]
    assert kept_tokens("window", 2, 9, 0, text).tolist() == [0, 1, 2]
    assert kept_tokens("window", 1, 6, -1, text).tolist() == [4, 5]
    assert kept_tokens("window", 1, 6, 3, text).tolist() == [2, 3, 4]
    # a grid of 3 x 3 and one of 4 x 4, after the class token
    assert kept_tokens("window", 0, 10, 0, config).tolist() == [0, 5]
    assert kept_tokens("window", 1, 10, 0, config).tolist() == list(range(10))
    assert kept_tokens("window", 1, 17, 0, config).tolist() == [0, 6, 7, 10, 11]


def dense_rv(u: Tensor, v: Tensor) -> float:
    """Return the RV coefficient of two sets of rows from its definition."""
    u, v = u - u.mean(0), v - v.mean(0)
    return float((u.T @ v).norm() ** 2 / ((u.T @ u).norm() * (v.T @ v).norm()))


def test_heads_are_alike_as_their_materialised_contributions_are() -> None:
    x, y = random(50, 6, seed=1), random(50, 8, seed=2)
    x_out, y_out = random(5, 6, seed=3), random(7, 8, seed=4)
    seen = Moments(x=6, y=8)
    seen.update(x=x, y=y)
    got = contribution_similarity(seen, x_out, y_out, (3, 2))
    for h, g in product(range(3), range(2)):
        a, b = slice(2 * h, 2 * h + 2), slice(4 * g, 4 * g + 4)
        want = dense_rv(x[:, a] @ x_out[:, a].T, y[:, b] @ y_out[:, b].T)
        assert float(got[h, g]) == pytest.approx(want, abs=1e-12)


def test_heads_are_alike_in_weights_whatever_the_order_scale_and_number_of_units() -> None:
    y = random(6, 9)
    x = torch.cat([3 * y[[5, 4, 3]], y[[2, 0, 1]]]).repeat_interleave(2, 0)
    alike = weight_similarity(x, y, (2, 2))
    torch.testing.assert_close(alike.fliplr().diagonal(), torch.ones(2).double(), **ALGEBRA)
    assert float(alike.diagonal().max()) < 0.9
    want = (y[:3] @ y[3:].T).norm() ** 2 / ((y[:3] @ y[:3].T).norm() * (y[3:] @ y[3:].T).norm())
    torch.testing.assert_close(alike.diagonal(), want.expand(2), **ALGEBRA)


def test_units_in_heads_and_keys_move_like_nested_maps(vit: Any) -> None:
    atlas = ViT().atlas(vit.config)
    alike = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).double()
    nu = (torch.arange(15) + 1.0).double() / 120
    mu = nu.reshape(3, 5)[[1, 2, 0]].reshape(-1)
    heads = match_heads(alike, mu, nu)
    cost = random(15, 15).square()
    joint = units_in_heads(cost, mu, nu, heads, Solver())
    inner = []
    for h, g in enumerate([1, 2, 0]):
        block = cost[5 * h : 5 * h + 5, 5 * g : 5 * g + 5]
        shares = mu[5 * h : 5 * h + 5], nu[5 * g : 5 * g + 5]
        inner.append(solve(block.contiguous(), *(s / s.sum() for s in shares)))
    maps = {"head.0": heads, "qk.0": NestedMap(inner), "vo.0": NestedMap(inner)}
    moved_axes = {
        "q_proj.weight": (0, joint.push), "k_proj.weight": (0, key_side(joint, (3, 3))),
        "v_proj.weight": (0, joint.push), "o_proj.weight": (1, joint.pull),
    }  # fmt: skip
    for name, (axis, got) in moved_axes.items():
        legs = atlas.axes[f"vit.layers.0.attention.{name}"][axis]
        torch.testing.assert_close(got, axis_matrix(legs, atlas, maps), **ALGEBRA)


def test_a_head_that_is_shared_moves_its_units_to_every_head() -> None:
    heads = match_heads(random(2, 3).abs().clamp_max(1), uniform(8), uniform(6))
    joint = units_in_heads(random(8, 6).square(), uniform(8), uniform(6), heads, Solver())
    torch.testing.assert_close(joint.mu, uniform(8), **ALGEBRA)
    torch.testing.assert_close(joint.nu, uniform(6), **ALGEBRA)
    torch.testing.assert_close(joint.plan.reshape(2, 4, 3, 2).sum((1, 3)), heads.plan, **ALGEBRA)


def test_wrong_parents_and_anchors_are_refused(vit: Any) -> None:
    deep = random_vit(num_hidden_layers=3)
    with pytest.raises(ParentError, match="deep"):
        fused([vit, deep], vit)
    with pytest.raises(ParentError, match="fit"):
        fused([random_vit(num_labels=4)], vit)
    target = ViT().build(widened(vit).config)
    with pytest.raises(ShapeError, match="anchor"):
        fuse_by_transport(
            [Parent("p", vit)], vit, target, ViT(), list, TransportSettings(), n_batches=0
        )
