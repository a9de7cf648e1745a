"""`target.budget.allocation: saliency`: a parent's own losses say which size pays for a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saliency.asked import asked_vit
from tiny_decoders import DECODERS, TOKENS, VOCABULARY, decoder
from tiny_run import TRAIN, recipe, save_parent, write_recipe
from torch import nn

from slimfuse.errors import ShapeError
from slimfuse.families import ViT
from slimfuse.fuse.scoring import cut_losses
from slimfuse.pipeline import plan
from slimfuse.pipeline.job import Job, prepare
from slimfuse.recipe import InvalidRecipe, Recipe, load_recipe
from slimfuse.saliency import Subject
from slimfuse.saliency.losses import own_answers
from slimfuse.shapes import Budget, Meter, Proposal, Wish, grid, resolve

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
HEADS = ("num_attention_heads", "intermediate_size")
SAVED = [{"name": "a", "from": "a"}]


def budget(allocation: str = "saliency", **keys: Any) -> dict[str, Any]:
    return {"budget": {"params": 0.65, "allocation": allocation, **keys}}


def dead(model: Any) -> None:
    """Leave 8 of the MLP's units something to say."""
    for layer in model.vit.layers:
        layer.mlp.fc2.weight[:, 8:] = 0


def copied(model: Any) -> None:
    """Make every unit one of 8."""
    for layer in model.vit.layers:
        layer.mlp.fc1.weight.copy_(layer.mlp.fc1.weight[:8].repeat(8, 1))


def saved(folder: Path, change: Callable[[Any], None] | None = None, **sizes: int) -> Path:
    save_parent(folder, **SIZES | sizes)
    if change is not None:
        model = ViT().load(folder)
        with torch.no_grad():
            change(model)
        model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def made(root: Path, target: dict[str, Any], **changes: Any) -> Job:
    spec = recipe(parents=SAVED, **changes)
    path = write_recipe(root / "tiny.yaml", {**spec, "target": target})
    found = load_recipe(path)
    assert isinstance(found, Recipe)
    return prepare(found, path)


def check_full(found: Proposal, limit: Budget, meter: Meter) -> None:
    """Assert that the budget is kept, and that one step more of the MLP would break it."""
    assert meter.meets(limit, found.shape)
    above = [v for v in grid("intermediate_size", found.shape, meter)
             if v > found.shape.intermediate_size]  # fmt: skip
    if above:
        assert not meter.meets(limit, replace(found.shape, intermediate_size=above[0]))


# -- what is taken ------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [dead, copied])
def test_what_an_mlp_says_twice_or_not_at_all_goes_first(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    saved(tmp_path / "a", change)
    plain, found = (made(tmp_path, budget(a)).proposal for a in ("proportional", "saliency"))
    meter = Meter(ViT().load_config(str(tmp_path / "a")), ViT())
    assert found.shape.hidden_size == 32 and plain.shape.hidden_size < 32
    assert found.shape.intermediate_size < plain.shape.intermediate_size
    for proposal in (plain, found):
        check_full(proposal, Budget("params", 0.65), meter)


@pytest.mark.parametrize(("kind", "share"), [("params", 0.5), ("flops", 0.35)])
def test_a_budget_is_kept_to_a_step(kind: str, share: float, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    target = {"budget": {kind: share, "allocation": "saliency"}}
    meter = Meter(ViT().load_config(str(tmp_path / "a")), ViT())
    check_full(made(tmp_path, target).proposal, Budget(kind, share), meter)  # type: ignore[arg-type]


def test_heads_that_say_nothing_go_first() -> None:
    """Of a family whose heads have a size of their own, so that fewer heads save weights."""
    family = DECODERS["llama"]
    alive, silent = decoder(family), decoder(family)
    with torch.no_grad():
        for layer in silent.model.layers:
            layer.self_attn.o_proj.weight[:, 8:] = 0  # of 6 heads of 4 units the last 4

    def proposed(model: nn.Module) -> Proposal:
        config: Any = model.config
        ids = torch.randint(VOCABULARY, (16, TOKENS), generator=torch.Generator().manual_seed(0))
        asked = Subject(model, family.atlas(config), family.layout(config), lambda: [ids],
                        own_answers())  # fmt: skip
        wish = Wish(budget=Budget("params", 0.7), free=HEADS)
        return resolve(wish, config, family, losses=cut_losses(asked))

    found = proposed(silent).shape
    assert found.num_attention_heads == 2
    assert found.intermediate_size > proposed(alive).shape.intermediate_size


def test_an_unmended_method_is_told_what_goes_with_the_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimfuse.pipeline import shaping

    seen = []

    def told(subject: Any, *, mended: bool) -> Any:
        seen.append(mended)
        return cut_losses(subject, mended=mended)

    monkeypatch.setattr(shaping, "cut_losses", told)
    saved(tmp_path / "a")
    for fuse in ({}, {"method": "select"}):
        made(tmp_path, budget(), fuse=fuse)
    assert seen == [True, False]


# -- the same each time, and told ---------------------------------------------------------------


def test_a_proposal_is_the_same_each_time_and_says_who_pays(tmp_path: Path) -> None:
    saved(tmp_path / "a", dead)
    first, again = (made(tmp_path, budget(), runtime={"seed": s}).proposal for s in (0, 1))
    assert first == again
    threads = torch.get_num_threads()
    notes = plan(tmp_path / "tiny.yaml").proposal
    assert torch.get_num_threads() == threads
    assert notes is not None and notes.notes == first.notes
    shape, plain = first.shape, made(tmp_path, budget("proportional")).proposal.shape
    stays = (
        "budget: share of the parent's that stays, beside a proportional shape: "
        f"hidden_size 1.000 ({plain.hidden_size / 32:.3f}), intermediate_size "
        f"{shape.intermediate_size / 64:.3f} ({plain.intermediate_size / 64:.3f})."
    )
    assert stays in first.notes
    asked = "budget: parent a says what each size is worth, on 70 calibration samples."
    assert first.notes[-1] == asked


def test_a_latency_is_told_beside_a_shape_of_as_many_flops() -> None:
    subject = asked_vit(20)
    config: Any = subject.model.config
    wish = Wish(budget=Budget("latency_ratio", 0.5))
    calls = []

    def time_ratio(narrow: Any) -> float:
        calls.append(narrow)
        return float(ViT().flops(narrow) / ViT().flops(config))

    found = resolve(wish, config, ViT(), time_ratio=time_ratio, losses=cut_losses(subject))
    assert any("beside a proportional shape of as many FLOPs: " in n for n in found.notes)
    assert len(calls) == len(found.measured) <= 6  # bisection of the rungs, none for the note


# -- who decides --------------------------------------------------------------------------------


def test_the_largest_of_several_parents_decides(tmp_path: Path) -> None:
    saved(tmp_path / "a", intermediate_size=32, hidden_size=16)
    saved(tmp_path / "b", dead)
    parents = [*SAVED, {"name": "b", "from": "b"}, {"name": "c", "train": {**TRAIN, "epochs": 1}}]
    path = write_recipe(
        tmp_path / "tiny.yaml", {**recipe(parents=parents), "target": budget(params=0.6)}
    )
    notes = prepare(Recipe.model_validate(recipe(parents=parents) | {"target": budget()}), path)
    assert "parent b, the largest, says" in notes.proposal.notes[-1]
    assert notes.proposal.shape.hidden_size == 32


def test_a_parent_that_is_yet_to_be_trained_can_not_decide(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", {**recipe(), "target": budget()})
    with pytest.raises(ShapeError, match="yet to train it") as error:
        plan(path)
    assert f"{path.name}:" in str(error.value.where)
    assert str(error.value.where).endswith("target.budget.allocation")
    assert error.value.got == "saliency, with parents.a.train"
    assert "from" in str(error.value.allowed) and "from" in str(error.value.hint)
    plan(path, overrides=("target.budget.allocation=proportional",))


def test_one_parent_has_to_have_every_size_that_may_shrink(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b", num_hidden_layers=3, hidden_size=16, intermediate_size=32)
    parents = [*SAVED, {"name": "b", "from": "b"}]
    free = ["intermediate_size", "num_hidden_layers"]
    spec = recipe(parents=parents) | {"target": budget(free=free)}
    path = write_recipe(tmp_path / "tiny.yaml", spec)
    with pytest.raises(ShapeError, match="none has the largest of every free size") as error:
        prepare(Recipe.model_validate(spec), path)
    assert "intermediate_size 64, num_hidden_layers 3" in str(error.value.allowed)
    free[1] = "hidden_size"
    found = prepare(Recipe.model_validate(spec | {"target": budget(free=free)}), path)
    assert found.proposal.shape.num_hidden_layers == 3


@pytest.mark.parametrize(
    "free", [["intermediate_size"], ["hidden_size", "num_attention_heads"], []]
)
def test_one_free_size_has_nothing_to_share_out(free: list[str], tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "x.yaml", recipe() | {"target": budget(free=free)})
    with pytest.raises(InvalidRecipe, match="has nothing to share out") as error:
        load_recipe(path)
    assert error.value.problems[0].loc == ("target", "budget", "allocation")
    if free:
        load_recipe(path, ("target.budget.allocation=proportional",))


def test_every_wrong_key_of_a_budget_is_told_at_once(tmp_path: Path) -> None:
    wrong = {"budget": {"allocation": "saliency", "free": ["hidden_size"]}}
    path = write_recipe(tmp_path / "x.yaml", recipe() | {"target": wrong})
    with pytest.raises(InvalidRecipe) as error:
        load_recipe(path)
    assert len(error.value.problems) == 2
