"""Intra-Fusion: copies inside one model are merged without loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families.cases import CASES, Case, deeper, duplicate, logits, moved
from tiny import images, maps_of, random_vit
from tiny import logits as answers
from tiny import moved as changed
from tiny_decoders import DECODERS, NARROW, TOKENS, VOCABULARY, build, decoder
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.errors import ParentError
from slimfuse.families import ViT
from slimfuse.fuse.intra import IntraSettings, intra_fuse, leading
from slimfuse.transport import from_plan

EXACT = 1e-5  # the contract's relative bound; measured values are below 1e-9
CASE = {case.name: case for case in CASES}


def gap(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


def grown(case: Case, spaces: tuple[str, ...]) -> Any:
    """Return the shape in which some spaces have doubled, and further keys of the config."""
    base = case.wide
    mlp, heads = base.intermediate_size, base.num_attention_heads
    return case.sized(
        base.hidden_size * (2 if "resid" in spaces else 1),
        heads * (2 if "head" in spaces else 1),
        mlp * (2 if "mlp" in spaces else 1),
    )


def doubled(case: Case, model: Any, spaces: tuple[str, ...]) -> Any:
    return moved(case, model, spaces, lambda n, _s: duplicate(n), case.config(grown(case, spaces)))


def narrowed(case: Case, wide: Any, like: Any, n: int = 16, **settings: Any) -> nn.Module:
    target = case.family.build(like.config).double()
    batch = case.batch(n)
    intra_fuse(wide, target, case.family, lambda: batch.split(8), IntraSettings(**settings))
    return target


@pytest.mark.parametrize("cost", ["activations", "weights", "combined"])
@pytest.mark.parametrize(
    ("saliency", "targets"),
    [("uniform", "uniform"), ("uniform", "own"), ("magnitude", "nearest"), ("mask-fisher", "own"),
     ("mask-fisher", "nearest")],
)  # fmt: skip
def test_doubled_units_are_merged_without_loss(saliency: str, cost: str, targets: str) -> None:
    """Targets of one mass are exact only for units of one mass."""
    case = CASE["vit"]
    model = case.model()
    wide = doubled(case, model, ("resid", "mlp", "head"))
    found = narrowed(case, wide, model, saliency=saliency, cost=cost, targets=targets)
    assert gap(logits(found, case.batch(5)), logits(model, case.batch(5))) < EXACT


@pytest.mark.parametrize("saliency", ["energy", "taylor", "diagonal-fisher", "ziplm", "l1"])
def test_every_saliency_sees_copies_alike(saliency: str) -> None:
    case = CASE["vit"]
    model = case.model()
    found = narrowed(case, doubled(case, model, ("mlp",)), model, saliency=saliency)
    if saliency != "ziplm":  # one of two copies costs nothing: they haven't the same mass
        assert gap(logits(found, case.batch(5)), logits(model, case.batch(5))) < EXACT


@pytest.mark.parametrize("name", list(CASE))
def test_every_encoder_gives_its_doubled_mlp_units_and_heads_back(name: str) -> None:
    case = CASE[name]
    model = case.parent()
    spaces = ("mlp",) if "num_attention_heads" in case.keeps else ("resid", "mlp", "head")
    pooler = case.family.layout(model.config).pooler
    if "resid" in spaces and pooler is not None:
        spaces += (pooler.space,)
    wide = doubled(case, model, spaces)
    found = narrowed(case, wide, model)
    assert gap(logits(found, case.batch(5)), logits(model, case.batch(5))) < EXACT


def test_units_inside_heads_come_back() -> None:
    model = random_vit()
    wide = changed(model, maps_of(model, ("qk", "vo"), lambda n, _s: duplicate(n)), head_dim=10)
    target = ViT().build(model.config).double()
    intra_fuse(wide, target, ViT(), lambda: images(16).split(8))
    assert gap(answers(target, images(5, 9)), answers(model, images(5, 9))) < EXACT


def test_unequal_numbers_of_copies_come_back_with_targets_that_gather() -> None:
    case = CASE["vit"]
    model = case.model()
    counts = torch.arange(17) % 3 + 1
    plan = torch.repeat_interleave(torch.eye(17).double() / 17, counts, dim=1)
    plan = plan / counts.repeat_interleave(counts)
    wide_sizes = case.sized(15, 3, int(counts.sum()))
    wide = moved(case, model, ("mlp",), lambda *_: from_plan(plan), case.config(wide_sizes))
    found = narrowed(case, wide, model, targets="nearest", saliency="mask-fisher")
    assert gap(logits(found, case.batch(5)), logits(model, case.batch(5))) < EXACT
    cut = narrowed(case, wide, model, targets="own", saliency="uniform")
    assert (
        gap(logits(cut, case.batch(5)), logits(model, case.batch(5))) > 1e-3
    )  # cuts across copies


def test_a_model_of_the_same_shape_is_itself() -> None:
    for name in ("vit", "bert"):
        case = CASE[name]
        model = case.model()
        found = narrowed(case, model, model)
        for key, value in found.named_parameters():
            torch.testing.assert_close(value, model.get_parameter(key), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(DECODERS))
def test_decoders_keep_their_most_salient_heads_whole(name: str) -> None:
    family = DECODERS[name]
    model = decoder(family)
    block = family.layout(model.config).blocks[0]
    with torch.no_grad():
        for b in family.layout(model.config).blocks:  # the second key head of three says nothing
            model.get_parameter(f"{b.o}.weight")[:, 8:16] = 0
    shape = family.shape(model.config)
    config = family.narrow(model.config, replace(shape, num_attention_heads=4))
    target = build(family, config)
    ids = torch.randint(VOCABULARY, (6, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = Batch({"input_ids": ids})
    intra_fuse(model, target, family, lambda: [batch])
    assert gap(target(ids).logits, model(ids).logits) < EXACT
    narrow = build(family, family.narrow(model.config, NARROW))
    found = intra_fuse(model, narrow, family, lambda: [batch])
    assert bool(torch.isfinite(narrow(ids).logits).all())
    assert {m.name for m in found.maps} == {"resid", "mlp.0", "mlp.1"}
    assert block.head_space == "head.0"


def test_fewer_blocks_are_evenly_spaced() -> None:
    case = CASE["vit"]
    model = case.model(deeper(case.wide, 4))
    target = case.family.build(case.config(deeper(case.wide, 2))).double()
    batch = case.batch(8)
    intra_fuse(model, target, case.family, lambda: [batch])
    kept = model.vit.layers[1], model.vit.layers[3]
    for old, new in zip(kept, target.vit.layers, strict=True):
        torch.testing.assert_close(new.mlp.fc1.weight, old.mlp.fc1.weight, rtol=0, atol=0)


def test_a_space_that_no_one_sees_may_not_shrink() -> None:
    case = CASE["electra-19"]
    model = case.model()
    target = case.family.build(case.config(embedding_size=13)).double()
    batch = case.batch(4)
    with pytest.raises(ParentError, match="can't see the units"):
        intra_fuse(model, target, case.family, lambda: [batch])


def test_leading_units_are_no_copies_while_there_are_others() -> None:
    cost = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 9], [9, 9, 0, 4], [9, 9, 4, 0]]).double()
    scores = torch.tensor([5.0, 4.0, 3.0, 1.0])
    assert leading(scores, cost, 2) == [0, 2]
    assert leading(scores, cost, 3) == [0, 2, 3]
    assert leading(scores, cost, 4) == [0, 1, 2, 3]
    assert leading(scores, torch.zeros(4, 4), 2) == [0, 1]
