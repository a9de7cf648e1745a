"""Refits of masked language models: a transform, and a head that is the embeddings' table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.cases import MASKED, Case, logits
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.errors import ParentError
from slimfuse.fuse import words
from slimfuse.fuse.labels import LabelUnion, mean_shares
from slimfuse.fuse.refit import Fusion, Parent, Settings, refit

CASE = {case.name: case for case in MASKED}
tied_or_not = pytest.mark.parametrize("name", ["bert-words", "electra-19-words"])


def fused(
    case: Case, parents: list[Parent], config: Any, **settings: Any
) -> tuple[nn.Module, Fusion]:
    """Return a target fused from padded texts, and what was done."""
    target, x = case.family.build(config).double(), case.batch(64)
    options = Settings(**{"stream": "select", "ridge": 1e-3, **settings})
    done = refit(parents, target, case.family, lambda: x.split(16), options, n_batches=4)
    return target, done


def told(model: nn.Module, x: Batch) -> Tensor:
    """Return the real tokens' logits, their mean over the vocabulary left out."""
    found = logits(model, x)[x.arguments["attention_mask"].bool()]
    return found - found.mean(1, keepdim=True)


@tied_or_not
def test_mean_logits_are_the_weighted_mean_of_the_parents(name: str) -> None:
    case, x = CASE[name], CASE[name].batch(64)
    models = [case.parent(seed) for seed in (0, 1)]
    parents = [Parent("a", models[0], 1.0), Parent("b", models[1], 3.0)]
    narrow = case.family.narrow(models[0].config, case.narrow)
    target, done = fused(case, parents, narrow)
    wanted = (told(models[0], x) + 3 * told(models[1], x)).mean(0) / 4
    # the bias takes up whatever the narrow features leave of it: the same sums in another order
    torch.testing.assert_close(told(target, x).mean(0), wanted, rtol=0, atol=1e-10)
    head = done.parts[-1]
    assert head.part == case.family.layout(narrow).head.rsplit(".", 1)[-1]
    assert 0.01 < head.error < 1


def test_the_error_that_is_told_is_the_share_of_the_logits_variance() -> None:
    case, x = CASE["bert-words"], CASE["bert-words"].batch(64)
    model = case.parent()
    target, done = fused(case, [Parent("a", model)], case.family.narrow(model.config, case.narrow))
    wanted = told(model, x)
    gap = told(target, x) - wanted
    share = gap.square().sum() / (wanted - wanted.mean(0)).square().sum()
    # what lies in the table's span and what does not are orthogonal: equal but for rounding
    assert done.parts[-1].error == pytest.approx(float(share), rel=1e-6)


@pytest.mark.parametrize("stream", ["pca", "select"])
def test_going_downhill_helps_on_other_texts(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASE["bert-words"]
    model, x = case.parent(), case.batch(200)[range(100, 200)]
    narrow = case.family.narrow(model.config, case.narrow)
    after, _ = fused(case, [Parent("a", model)], narrow, stream=stream)
    monkeypatch.setattr(words, "STEPS", 0)
    before, _ = fused(case, [Parent("a", model)], narrow, stream=stream)
    wanted = told(model, x)
    gaps = [float((told(one, x) - wanted).norm()) for one in (before, after)]
    assert gaps[1] < 0.98 * gaps[0]
    same = {n: p for n, p in before.named_parameters() if "cls" not in n}
    for name, value in after.named_parameters():  # only the head goes downhill
        assert value.requires_grad and value.grad is None
        assert name not in same or torch.equal(value, same[name])


def test_a_shared_table_keeps_its_mean_over_channels() -> None:
    # the first norm doesn't see it, the head does
    case = CASE["bert-words"]
    model = case.parent()
    target, _ = fused(case, [Parent("a", model)], model.config)
    name = case.family.layout(model.config).embed_parameters[0]
    table = model.get_parameter(name)
    assert table.mean(1).abs().max() > 0.1
    torch.testing.assert_close(target.get_parameter(name), table, rtol=0, atol=1e-10)


@tied_or_not
def test_a_narrow_head_is_closer_than_random_features(name: str) -> None:
    case, x = CASE[name], CASE[name].batch(9)
    model = case.parent()
    narrow = case.family.narrow(model.config, case.narrow)
    torch.manual_seed(0)
    control, texts = case.family.build(narrow).double(), case.batch(64)
    refit(
        [Parent("a", model)], control, case.family, lambda: texts.split(16), Settings(ridge=1e-3),
        n_batches=4, random_features=True,
    )  # fmt: skip
    ours, _ = fused(case, [Parent("a", model)], narrow, stream="pca")
    gaps = [float((told(one, x) - told(model, x)).norm()) for one in (ours, control)]
    assert gaps[0] < gaps[1]


def test_other_goals_than_the_mean_are_refused() -> None:
    union = LabelUnion([torch.arange(3)], [1.0], 3, None)
    with pytest.raises(ParentError, match="mean of their parents' logits"):
        mean_shares(union)
