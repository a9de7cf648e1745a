"""Recipes of plain nets: those that load, and errors with their lines before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets.tiny_nets import MLP, SHIPPED, TRAIN, Build, save_net

from slimfuse.data import load_digits
from slimfuse.errors import DataError, ParentError, RecipeError, ShapeError, UserError
from slimfuse.nets import (
    MLPConfig,
)
from slimfuse.pipeline import compare, plan
from slimfuse.recipe import NetRecipe, load_recipe, recipe_schema

torch.set_num_threads(1)

FAMILY_NAMES = (
    "vit, deit, dinov2, timm-vit, bert, roberta, distilbert, mpnet, electra, gpt2, llama, qwen2, "
    "qwen3, gemma3, auto"
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert path.read_text().startswith("# ")
    loaded = load_recipe(path)
    assert isinstance(loaded, NetRecipe)
    lock = loaded.to_lock()
    assert NetRecipe.model_validate(json.loads(json.dumps(lock))).to_lock() == lock


def test_there_is_a_recipe_for_every_original_case() -> None:
    assert {p.stem for p in SHIPPED} == {
        "mlp-equal", "mlp-narrow", "vgg-equal", "vgg-pruned", "resnet",
    }  # fmt: skip


def test_shipped_recipes_on_digits_have_a_plan() -> None:
    for path in SHIPPED:
        made = plan(path, overrides=("data.source=digits", "data.image_size=28"))
        assert made.models[-1].name == "child" and made.proposal is None
        assert made.models[-1].params <= max(m.params for m in made.models)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"family": "atuo"},
            [f"family: unknown value; did you mean 'auto'? got: 'atuo'; allowed: {FAMILY_NAMES}"],
        ),
        (
            {"parents__0__train__config": {"architecture": "vgg", "features": [4, "P"],
                                           "stages": [3]}},
            [
                "parents[0].train.config.features[1]: neither channels nor a pooling; got: 'P'; "
                "allowed: M or integer >= 1",
                "parents[0].train.config.stages: has no effect: architecture is 'vgg'; "
                "allowed: null",
            ],
        ),
        (
            {"parents__0__train__config": {"architecture": "resnet", "stages": [3, 4],
                                           "blocks": [1], "inner": [2, 2]}},
            [
                "parents[0].train.config.blocks: does not fit stages; allowed: 2 numbers, one a "
                "stage",
                "parents[0].train.config.inner: does not fit blocks; allowed: 1 numbers, one a "
                "block",
            ],
        ),
        (
            {"parents__0__train__config": {"architecture": "resnet", "stages": [3]}},
            ["parents[0].train.config.blocks: missing key: architecture 'resnet' needs it"],
        ),
        (
            {"parents__2__pruned__of": "c", "fuse__anchor": {"parent": "slim", "weight": 2.0}},
            [
                "parents[2].pruned.of: no such parent; got: 'c'; allowed: a, b, slim",
                "fuse.anchor.weight: has no effect: a parent's weight stands with the parent; "
                "got: 2.0; allowed: with from or train",
                "fuse.anchor.parent: is not fused: not in fuse.parents; got: 'slim'; "
                "allowed: a, b",
            ],
        ),
        (
            {"parents__0": {"name": "a", "pruned": {"of": "b"}}},
            ["parents[0].pruned.of: must stand before the net that is pruned from it; got: 'b'"],
        ),
        (
            {"parents__1__pruned": {"of": "a"}, "parents__1__name": "vanilla",
             "fuse__anchor": {}, "fuse__parents": ["a"]},
            [
                "parents[1].pruned: stands beside 'train'; allowed: one of the two",
                "parents[1].name: is the name of a report row; got: 'vanilla'; allowed: any but "
                "fused, finetuned, onnx, onnx-int8, random-start, anchor, ot, vanilla, unfused, "
                "sparse, sparse-woodfisher, sparse-woodtaylor, sparse-diagonal-fisher, "
                "sparse-magnitude, sparse-random",
                "fuse.anchor: missing key: needs one of 'parent', 'from', 'train'",
                "finetune.distill.teachers[1]: no such parent; got: 'b'; allowed: a, vanilla, slim",
            ],
        ),
        (
            {"target__widths": [3, 0], "fuse__ot": {"reg": 0.1}},
            [
                "fuse.ot.reg: has no effect: solver is 'emd'; got: 0.1; allowed: with another "
                "solver",
                "target.widths: neither a ratio nor a list of widths; got: a list; allowed: "
                "number > 0 and <= 1 or a list of 1 or more, each integer >= 1 or null",
            ],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_lines(
    recipe: Build, changes: dict[str, Any], lines: list[str]
) -> None:
    path = recipe(**changes)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    found = str(caught.value).replace(f"{path}:", "").split("\n")
    numbers, texts = zip(*(line.split(": ", 1) for line in found), strict=True)
    assert sorted(texts) == sorted(lines)
    text = path.read_text().splitlines()
    for number, problem in zip(numbers, texts, strict=True):
        key = problem.split(":")[0].split(".")[-1].split("[")[0]
        assert key in text[int(number) - 1] or "[" in problem.split(":")[0]


def test_an_unknown_family_is_the_only_complaint(recipe: Build) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(family="elmo"))
    assert str(caught.value).endswith(f"got: 'elmo'; allowed: {FAMILY_NAMES}")
    assert "\n" not in str(caught.value)


def test_the_schema_knows_both_families() -> None:
    schema = recipe_schema()
    names = [option["$ref"].rpartition("/")[2] for option in schema["oneOf"]]
    assert names == ["Recipe", "NetRecipe"]
    declared, plain = (schema["$defs"][name]["properties"]["family"] for name in names)
    assert ", ".join([*declared["enum"], plain["const"]]) == FAMILY_NAMES
    assert all(set(schema["required"]) <= set(schema["$defs"][n]["required"]) for n in names)


@pytest.mark.parametrize(
    ("changes", "error", "where", "text"),
    [
        ({"target__widths": 0.5}, ShapeError, "target.widths", "anchor's widths"),
        ({"target__widths": [3]}, ShapeError, "target.widths", "don't fit the net"),
        (
            {"fuse__parents": ["a", "slim"], "fuse__method": "vanilla", "baselines": []},
            ShapeError, "fuse.method", "slim: [7, 4]",
        ),
        ({"fuse__parents": ["a"], "baselines": []}, ParentError, "fuse.method", "beside"),
        (
            {"parents__1__train__config": {"architecture": "mlp", "hidden": [7]}},
            ParentError, "parents.b", "hidden [7]",
        ),
        (
            {"parents__1__train__config": {"architecture": "vgg", "features": [4]}},
            ParentError, "parents.b", "more than the widths",
        ),
        (
            {"parents__1__train__config":
                {"architecture": "vgg", "features": ["M", "M", "M", "M"], "hidden": [4]}},
            UserError, "parents.b", "poolings",
        ),
        ({"parents__1__train__shard": "1/200"}, DataError, "parents.b.train.shard", "shards"),
        (
            {"parents__2__pruned__train": {"epochs": 1, "shard": "1/200"}},
            DataError, "parents.slim.pruned.train.shard", "shards",
        ),
        (
            {"fuse__anchor": {"train": {**TRAIN, "config": {**MLP, "hidden": [3]}}}},
            ParentError, "fuse.anchor", "more than the widths",
        ),
    ],
)  # fmt: skip
def test_misfits_are_told_with_the_line(
    recipe: Build, changes: dict[str, Any], error: type[UserError], where: str, text: str
) -> None:
    path = recipe(**changes)
    with pytest.raises(error) as caught:
        plan(path)
    told = caught.value.where
    assert told is not None and told.startswith(f"{path}:") and where in told
    assert text in str(caught.value)


def test_saved_parents_must_know_the_datas_classes(recipe: Build, tmp_path: Path) -> None:
    labels = tuple(load_digits().classes)
    for config, text in (
        (MLPConfig(192, (5,), 9), "9: without names"),
        (MLPConfig(192, (5,), 10, labels[::-1]), "10: 9, 8"),
    ):
        save_net(tmp_path / "net", config)
        parents = [{"name": "a", "from": "net"}]
        with pytest.raises(DataError, match=text):
            plan(recipe(parents=parents, fuse={}, baselines=[], finetune={}))
    save_net(tmp_path / "net", MLPConfig(100, (5,), 10))
    with pytest.raises(ParentError, match="doesn't take the data's images"):
        plan(recipe(parents=parents, fuse={}, baselines=[], finetune={}))


def test_compare_refuses_plain_nets(net_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="declared families only") as caught:
        compare(net_recipe, out=tmp_path)
    assert caught.value.where is not None and caught.value.where.startswith(f"{net_recipe}:")
