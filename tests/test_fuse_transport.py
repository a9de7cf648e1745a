"""The faithful mode: exactly widened and permuted copies come back, and where they can't.

Copies are fused with `anchor_weight=0` unless a test says otherwise: the anchor's own weights would
hide errors.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from tiny import duplicate, images, logits, maps_of, moved, permute, random_vit
from torch import Tensor, nn

from slimfuse.errors import ParentError, ShapeError, UserError
from slimfuse.families import ViT
from slimfuse.fuse import transport_move
from slimfuse.fuse.transport import TransportFusion, TransportSettings, fuse_by_transport
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
from slimfuse.spaces import LinearMap, NestedMap
from slimfuse.spaces.transform import axis_matrix
from slimfuse.transport import Solver, TransportMap, from_plan, solve, uniform

FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-14
WRONG = 1e-2  # another function than the anchor's; measured values are above 0.05
ALGEBRA = {"rtol": 0, "atol": 1e-12}  # float64, exact identities of numbers of order 1
EVERY = ("resid", "head", "qk", "vo", "mlp")
SPACES = {"resid": ("resid",), "head": ("head",), "qk": ("qk", "vo"), "mlp": ("mlp",), "all": EVERY}
GROWN: dict[str, dict[str, int]] = {
    "resid": {"hidden_size": 30, "head_dim": 5},
    "head": {"num_attention_heads": 6, "head_dim": 5},
    "qk": {"head_dim": 10},
    "mlp": {"intermediate_size": 34},
    "all": {
        "hidden_size": 30, "num_attention_heads": 6, "head_dim": 10, "intermediate_size": 34,
    },
}  # fmt: skip
RESIDUALS = ("none", "residual-only", "mean", "weighted-scalar", "weighted-matrix")
QKS = ("separate", "joint", "equal")
COSTS = ("activations", "weights", "combined")
HEADS = ("kept", "crossed")


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def widened(model: nn.Module, space: str = "all") -> nn.Module:
    maps = maps_of(model, SPACES[space], lambda n, _seed: duplicate(n))
    return moved(model, maps, **GROWN[space])


def permuted(model: nn.Module, spaces: tuple[str, ...] = EVERY, seed: int = 0) -> nn.Module:
    return moved(model, maps_of(model, spaces, lambda n, s: permute(n, s + seed)))


def fused(
    parents: list[nn.Module], anchor: nn.Module, n: int = 48, **settings: Any
) -> tuple[nn.Module, TransportFusion]:
    target = ViT().build(anchor.config).double()
    x = images(n, seed=7)
    result = fuse_by_transport(
        [Parent(f"p{i}", m) for i, m in enumerate(parents)],
        anchor,
        target,
        ViT(),
        lambda: x.split(16),
        TransportSettings(**{"anchor_weight": 0.0, **settings}),
        n_batches=n // 16,
    )
    return target, result


def error(parents: list[nn.Module], anchor: nn.Module, **settings: Any) -> float:
    x = images(9)
    return gap(logits(fused(parents, anchor, **settings)[0], x), logits(anchor, x))


# -- copies come back -------------------------------------------------------------------------


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


# -- the tests above can fail -------------------------------------------------------------------


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


# -- where theory says that copies can't come back ----------------------------------------------


def edited(change: Any) -> nn.Module:
    model = random_vit()
    with torch.no_grad():
        change(model.vit)
    return model


def test_proportional_queries_tie_for_correlations_unless_keys_have_a_say() -> None:
    def proportional(vit: Any) -> None:
        q = vit.layers[0].attention.q_proj
        for head, i in product(range(3), range(1, 5)):
            for part in (q.weight, q.bias):
                part[5 * head + i] = (1 + i) * part[5 * head]

    anchor = edited(proportional)
    copy = widened(anchor)
    assert error([copy], anchor, qk="separate") > WRONG
    assert error([copy], anchor, qk="equal") > WRONG
    assert error([copy], anchor, qk="joint") < FUSED
    for qk, cost in product(QKS, ("weights", "combined")):
        assert error([copy], anchor, qk=qk, cost=cost) < FUSED


def test_equal_queries_of_several_heads_tie_when_heads_cross_and_keys_follow() -> None:
    def same(vit: Any) -> None:
        q = vit.layers[0].attention.q_proj
        for head, part in product((1, 2), (q.weight, q.bias)):
            part[5 * head : 5 * head + 5] = part[:5]

    anchor = edited(same)
    copy = permuted(anchor)
    assert error([copy], anchor, heads="crossed", qk="equal") > WRONG
    for heads, qk in product(HEADS, QKS):
        if (heads, qk) != ("crossed", "equal"):
            assert error([copy], anchor, heads=heads, qk=qk) < FUSED


def test_units_that_never_vary_tie_for_correlations() -> None:
    anchor = edited(lambda vit: vit.layers[0].mlp.fc1.weight[:6].zero_())
    copy = widened(anchor, "mlp")
    assert error([copy], anchor) > WRONG
    assert error([copy], anchor, cost="weights") < FUSED


def test_a_branch_that_writes_nothing_loses_the_map_that_only_it_decides() -> None:
    def silent(vit: Any) -> None:
        o = vit.layers[0].attention.o_proj
        o.weight.zero_()
        o.bias.zero_()

    anchor = edited(silent)
    copy = permuted(anchor)
    for cost in ("activations", "weights"):
        for residual in ("none", "mean"):
            assert error([copy], anchor, residual=residual, cost=cost) > WRONG
        for residual in ("residual-only", "weighted-scalar", "weighted-matrix"):
            assert error([copy], anchor, residual=residual, cost=cost) < FUSED


def test_tied_embeddings_lose_the_map_that_the_skip_carries_on() -> None:
    def tied(vit: Any) -> None:
        e = vit.embeddings
        patches = e.patch_embeddings.projection
        for first, i in product(range(0, 15, 3), (1, 2)):
            for part in (patches.weight, patches.bias):
                part[first + i] = part[first]
            for part in (e.cls_token, e.position_embeddings):
                part[..., first + i] = part[..., first]

    anchor = edited(tied)
    copy = permuted(anchor)
    assert error([copy], anchor, residual="none") < FUSED
    for residual in RESIDUALS[1:]:
        assert error([copy], anchor, residual=residual) > WRONG


def split(counts: list[int]) -> TransportMap:
    """Return the plan that splits unit i into counts[i] equal copies."""
    plan = torch.zeros(len(counts), sum(counts), dtype=torch.float64)
    for i, row in enumerate(plan):
        start = sum(counts[:i])
        row[start : start + counts[i]] = 1 / (len(counts) * counts[i])
    return from_plan(plan)


UNEQUAL: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "mlp": ({"mlp": split([1, 2, 3, 1, 2] * 3 + [1, 4])}, {"intermediate_size": 32}),
    "head": ({"head": split([1, 2, 3])}, {"num_attention_heads": 6, "head_dim": 5}),
    "qk": (
        {s: NestedMap([split([1, 2, 1, 3, 1])] * 3) for s in ("qk", "vo")}, {"head_dim": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("space", list(UNEQUAL))
@pytest.mark.parametrize("heads", HEADS)
def test_copies_in_unequal_numbers_need_masses_by_saliency(
    vit: Any, space: str, heads: str
) -> None:
    maps, sizes = UNEQUAL[space]
    wide = moved(vit, {f"{k}.{i}": m for k, m in maps.items() for i in range(2)}, **sizes)
    assert gap(logits(wide, images(9)), logits(vit, images(9))) < FUSED
    assert error([wide], vit, heads=heads, masses="uniform") > WRONG
    assert error([wide], vit, heads=heads, masses="norm") > WRONG
    assert error([wide], vit, heads=heads, masses="saliency") < FUSED


def test_an_entropic_plan_mixes_units_and_doesnt_return_the_anchor(vit: Any) -> None:
    for heads in HEADS:
        assert error([vit], vit, solver=Solver("sinkhorn", reg=0.5), heads=heads) > WRONG


@pytest.mark.parametrize(
    "solver",
    [
        Solver("sinkhorn", effective_units=3.0),
        Solver("unbalanced", reg=0.5),
        Solver("partial", mass=0.7),
    ],
    ids=lambda s: s.kind,
)
def test_soft_unbalanced_and_partial_plans_fuse_parents_of_odd_sizes(
    vit: Any, solver: Solver
) -> None:
    parent = random_vit(seed=5, hidden_size=20, num_attention_heads=4, intermediate_size=11)
    target, result = fused([parent], vit, solver=solver, n=32, residual="weighted-matrix")
    assert bool(torch.isfinite(logits(target, images(9))).all())
    for m in result.maps:
        if solver.effective_units and m.name.startswith(("stream.0", "attention", "mlp")):
            assert m.effective_units == pytest.approx(3.0, rel=0.05)  # the solver's own tolerance


def test_a_softness_that_a_space_cant_have_is_told_with_its_map(vit: Any) -> None:
    solver = Solver("sinkhorn", effective_units=16.0)
    with pytest.raises(UserError, match="can't be solved") as raised:
        fused([vit], vit, solver=solver)
    assert raised.value.where == "fuse.ot" and "stream.0 of p0" in raised.value.what  # 15 at most


# -- the parts ----------------------------------------------------------------------------------


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
