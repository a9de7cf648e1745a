"""The faithful mode where copies can't come back: ties, equal rows, unequal numbers, soft plans."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from fuse.copies import (
    FUSED,
    HEADS,
    QKS,
    RESIDUALS,
    WRONG,
    error,
    fused,
    gap,
    permuted,
    widened,
)
from tiny import images, logits, moved, random_vit
from torch import nn

from slimfuse.errors import UserError
from slimfuse.spaces import NestedMap
from slimfuse.transport import Solver, TransportMap, from_plan


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
