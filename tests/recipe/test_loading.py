"""Recipes that load: defaults, overrides, shipped recipes, the list of a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from recipe.texts import GOOD

from slimfuse.errors import RecipeError
from slimfuse.recipe import (
    find_recipes,
    load_recipe,
)

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


def stem(path: Path) -> str:
    return path.stem


def test_defaults_are_filled_in_under_the_yaml_names(write: Any) -> None:
    recipe = load_recipe(write(GOOD))
    lock = recipe.to_lock()
    assert recipe.parents[0].from_ == "some/model"
    assert lock["parents"][0] == {
        "name": "a", "from": "some/model", "train": None, "weight": 1.0, "revision": None,
    }  # fmt: skip
    assert lock["fuse"] == {
        "method": "refit", "parents": None, "stream": "pca", "units": "cholesky",
        "saliency": None, "parent_weights": "equal", "heads": "drop",
        "ridge": "auto", "layers": None, "alignment": "gauge", "refit": True,
        "ot": lock["fuse"]["ot"], "batch_size": 128,
    }  # fmt: skip
    assert lock["fuse"]["ot"] == {
        "solver": "emd", "reg": None, "effective_units": None, "marginal_reg": 1.0, "mass": 1.0,
        "cost": "activations", "masses": "uniform", "residual": "mean", "qk": "equal",
        "heads": "kept", "tokens": "all", "window": 1, "anchor": None, "anchor_weight": None,
    }  # fmt: skip
    assert lock["bench"] == {"threads": [1], "batch": [1, 8], "warmup": 10, "min_seconds": 3.0}
    assert lock["finetune"]["distill"]["teachers"] is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("1E-3", 1e-3), (".5", 0.5), ("+2", 2.0), ("3", 3.0)],
)
def test_a_number_is_what_yaml_1_2_calls_one(write: Any, text: str, value: float) -> None:
    for head in ("", "%YAML 1.1\n---\n"):  # 1.1 reads 1e-3 as text
        lr = load_recipe(write(f"{head}{GOOD}finetune: {{lr: {text}}}\n")).finetune.lr
        assert lr == value and type(lr) is float


def test_json_is_yaml_with_its_surrogate_pairs(write: Any) -> None:
    recipe = load_recipe(write(GOOD.replace("some/model", '"\\ud83d\\ude00"')))
    assert recipe.parents[0].from_ == "\N{GRINNING FACE}"


@pytest.mark.parametrize("value", [1, 1.0, 32, 0.25])
def test_a_size_stays_absolute_or_ratio(write: Any, value: int | float) -> None:
    size = load_recipe(write(GOOD), [f"target.hidden_size={value}"]).target.hidden_size
    assert size == value and type(size) is type(value)


def test_overrides_set_nested_keys_items_and_lists(write: Any) -> None:
    overrides = [
        "parents.0.weight=3", "parents[1].train.epochs=7", "finetune.distill.teachers=[b]",
        "fuse.stream=ot", "fuse.ot.solver=sinkhorn", "fuse.ot.reg=1e-1", "fuse.ot.reg=2e-1",
        "parents.0.from=null",
        "parents.0.train="
        "{epochs: 1, config: {hidden_size: 6, num_hidden_layers: 1, num_attention_heads: 3,"
        " intermediate_size: 5, patch_size: 2}}",
    ]  # fmt: skip
    recipe = load_recipe(write(GOOD), overrides)
    assert recipe.parents[0].weight == 3.0 and recipe.fuse.ot.reg == 0.2
    assert recipe.parents[1].train is not None and recipe.parents[1].train.epochs == 7
    assert recipe.parents[0].from_ is None and recipe.parents[0].train is not None
    assert recipe.finetune.distill.teachers == ("b",)


def test_a_recipe_is_frozen(write: Any) -> None:
    recipe = load_recipe(write(GOOD))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.fuse.ridge = 1.0  # type: ignore[misc]
    assert isinstance(hash(recipe), int)


@pytest.mark.parametrize("path", SHIPPED, ids=stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert path.parent.name in (recipe.family, "ablations")
    assert len(SHIPPED) >= 20


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "ablations").glob("*.yaml")), ids=stem)
def test_an_ablation_changes_one_choice_of_the_base(path: Path) -> None:
    base, lock = (load_recipe(p).to_lock() for p in (path.with_name("base.yaml"), path))
    assert lock["name"] == f"ablation-{path.stem}" and lock["fuse"]["method"] == "ot"
    if path.stem == "equal-width":
        assert lock["fuse"]["ot"]["anchor"]["train"] == lock["parents"][0]["train"]
        return
    changed = {k for k, v in lock["fuse"]["ot"].items() if v != base["fuse"]["ot"][k]}
    softness = {"reg", "effective_units", "marginal_reg", "mass"}
    assert len(changed - softness) == (path.stem != "base")
    assert changed <= softness | {"solver"} or not changed & softness
    lock["fuse"]["ot"], lock["name"] = base["fuse"]["ot"], base["name"]
    assert lock == base


def test_the_recipe_imports_no_torch() -> None:
    code = "import sys, slimfuse.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_find_recipes_lists_good_and_faulty_ones(tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "b.yaml").write_text("# yaml-language-server: $schema=x\n" + GOOD)
    (tmp_path / "a.yaml").write_text("version: 1\n# late\n")
    bad, good = find_recipes(tmp_path)
    assert (good.name, good.family, good.task) == ("try", "vit", "image-classification")
    assert good.summary == "A short line about it." and good.error is None
    assert (bad.path.name, bad.name, bad.summary) == ("a.yaml", "a", "")
    assert isinstance(bad.error, RecipeError)
    with pytest.raises(RecipeError, match="no such folder"):
        find_recipes(tmp_path / "none")


def test_shipped_recipes_have_a_summary() -> None:
    assert all(info.summary and info.error is None for info in find_recipes(ROOT / "recipes"))
