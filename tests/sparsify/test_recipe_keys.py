"""The keys of `sparsify:`: what is refused, with one clear finding each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from tiny_run import recipe, write_recipe

from slimfuse.errors import RecipeError, UserError
from slimfuse.pipeline.sparse import settings_of
from slimfuse.recipe import load_recipe
from slimfuse.recipe.models import RESERVED_NAMES
from slimfuse.recipe.sparsifying import (
    BY_BLOCK,
    BY_GRADIENTS,
    Sparsify,
    WeightScorer,
    own_sparsity,
)
from slimfuse.saliency import obs
from slimfuse.saliency.patterns import parse_pattern
from slimfuse.saliency.sparsify_spec import Spec
from slimfuse.saliency.weight_scores import WEIGHT_SCORERS


def test_the_recipe_names_what_the_library_has() -> None:
    assert get_args(WeightScorer) == tuple(WEIGHT_SCORERS)
    needs = {name: scorer.needs for name, scorer in WEIGHT_SCORERS.items()}
    assert tuple(n for n, need in needs.items() if need == "block") == BY_BLOCK
    assert tuple(n for n, need in needs.items() if need != "none") == BY_GRADIENTS
    updates = get_args(get_args(Sparsify.model_fields["update"].annotation)[0])
    assert set(updates) == set(get_args(obs.Update))
    spec, own = Spec(0.5), Sparsify(sparsity=0.5)
    assert (own.scorer, own.block, own.steps, own.initial, own.pattern) == (
        spec.scorer, spec.block, spec.steps, spec.initial, str(spec.pattern)
    )  # fmt: skip
    assert own.damping.relative == spec.damping.value and spec.damping.relative
    assert {"sparse", *(f"sparse-{name}" for name in WEIGHT_SCORERS)} <= set(RESERVED_NAMES)


def test_scores_of_gradients_share_one_threshold() -> None:
    joint = {s: settings_of(Sparsify(sparsity=0.5), s, 0).joint for s in get_args(WeightScorer)}
    assert {s for s, one in joint.items() if one} == set(BY_GRADIENTS)
    for asked in (True, False):
        spec = Sparsify(sparsity=0.5, joint=asked)
        assert all(settings_of(spec, s, 0).joint is asked for s in get_args(WeightScorer))


@pytest.mark.parametrize(
    "text",
    ["unstructured", "2:4", "1:3", "4x1", "1x8", "4:2", "0:4", "4x0", "x", "2:", "2x", "3:3"],
)
def test_a_pattern_is_what_the_library_reads(text: str) -> None:
    try:
        parsed = parse_pattern(text)
    except UserError:
        with pytest.raises(ValueError, match="unknown pattern of zeros"):
            Sparsify(sparsity=0.5, pattern=text)
        return
    own = parsed.sparsity
    assert own_sparsity(text) == own
    assert Sparsify(sparsity=None if own else 0.5, pattern=text).pattern == text


def test_defaults() -> None:
    assert Sparsify(sparsity=0.5).compared == ("magnitude",)
    assert Sparsify(sparsity=0.5, scorer="magnitude").compared == ()
    assert Sparsify(sparsity=0.5, controls=()).compared == ()
    assert Sparsify(sparsity=0.5, damping=3).damping.relative == 3.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, "sparsify.sparsity: missing key: only an N:M pattern says it; "
         "allowed: a share of zeros, 0 to 1"),
        ({"sparsity": 1.0}, "sparsify.sparsity: out of range; got: 1.0; "
         "allowed: number > 0 and < 1 or null"),
        ({"sparsity": 0.8, "pattern": "2:4"}, "sparsify.sparsity: pattern 2:4 has a sparsity of "
         "its own; got: 0.8; allowed: null or 0.5"),
        ({"pattern": "2:4", "joint": False}, "sparsify.joint: has no effect: pattern 2:4 decides "
         "group by group; got: false; allowed: with another pattern"),
        ({"pattern": "4:2"}, "sparsify.pattern: unknown pattern of zeros; got: '4:2'; allowed: "
         '"unstructured", "2:4" (2 of every 4 inputs stay), "4x1" (outputs x inputs)'),
        ({"sparsity": 0.5, "scorer": "magnitud"}, "sparsify.scorer: unknown value; did you mean "
         "'magnitude'? got: 'magnitud'; allowed: woodfisher, woodtaylor, diagonal-fisher, "
         "magnitude, random"),
        ({"sparsity": 0.5, "scorer": "magnitude", "update": "joint"}, "sparsify.update: goes by a "
         "block Fisher, which scorer 'magnitude' has none of; got: 'joint'; allowed: null or none, "
         "or scorer: woodfisher or woodtaylor"),
        ({"sparsity": 0.5, "scorer": "diagonal-fisher", "block": 9}, "sparsify.block: has no "
         "effect here; got: 9; allowed: with scorer: woodfisher, woodtaylor"),
        ({"sparsity": 0.5, "scorer": "magnitude", "samples": 9}, "sparsify.samples: has no effect "
         "here; got: 9; allowed: with scorer: woodfisher, woodtaylor, diagonal-fisher"),
        ({"sparsity": 0.5, "scorer": "random", "damping": 0.2}, "sparsify.damping: has no effect "
         "here; allowed: with scorer: woodfisher, woodtaylor, diagonal-fisher"),
        ({"sparsity": 0.5, "damping": {"relative": 1.0, "absolute": 1.0}},
         "sparsify.damping.absolute: stands beside 'relative'; got: 1.0; allowed: one of the two"),
        ({"sparsity": 0.5, "damping": 0}, "sparsify.damping.relative: out of range; got: 0; "
         "allowed: number > 0 or null"),
        ({"sparsity": 0.5, "controls": ["random", "woodfisher"]}, "sparsify.controls[1]: is the "
         "scorer itself; got: 'woodfisher'; allowed: another scorer"),
        ({"sparsity": 0.5, "scorer": "woodtaylor", "fisher": "own-answers"},
         "sparsify.fisher: woodtaylor goes along a mean gradient, which own answers haven't; got: "
         "'own-answers'; allowed: fisher: labels, or another scorer"),
        ({"sparsity": 0.5, "controls": ["woodtaylor"], "fisher": "own-answers"},
         "sparsify.fisher: woodtaylor goes along a mean gradient, which own answers haven't; got: "
         "'own-answers'; allowed: fisher: labels, or another scorer"),
        ({"sparsity": 0.5, "initial": 0.1}, "sparsify.initial: has no effect here; got: 0.1; "
         "allowed: with steps above 1"),
        ({"sparsity": 0.5, "initial": 0.6, "steps": 2}, "sparsify.initial: is more than there are "
         "zeros at the end; got: 0.6; allowed: at most 0.5"),
    ],
)  # fmt: skip
def test_one_mistake_one_finding(tmp_path: Path, keys: dict[str, Any], line: str) -> None:
    path = write_recipe(tmp_path / "r.yaml", recipe(sparsify=keys))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (found,) = str(caught.value).split("\n")
    assert found.partition(": ")[2] == line


def test_a_fisher_of_labels_needs_labels(tmp_path: Path) -> None:
    keys = {"sparsity": 0.5, "fisher": "labels"}
    path = write_recipe(tmp_path / "r.yaml", recipe(task="feature-extraction", sparsify=keys))
    with pytest.raises(RecipeError, match=r"sparsify\.fisher: task 'feature-extraction' has no"):
        load_recipe(path)


def test_woodtaylor_needs_a_task_with_labels(tmp_path: Path) -> None:
    keys = {"sparsity": 0.5, "scorer": "woodtaylor"}
    path = write_recipe(tmp_path / "r.yaml", recipe(task="feature-extraction", sparsify=keys))
    with pytest.raises(RecipeError, match=r"which own answers haven't.*another scorer"):
        load_recipe(path)


def test_a_control_makes_a_key_count(tmp_path: Path) -> None:
    keys = {"sparsity": 0.5, "scorer": "magnitude", "samples": 9, "controls": ["woodfisher"]}
    load_recipe(write_recipe(tmp_path / "r.yaml", recipe(sparsify=keys)))


def test_only_keep_may_leave_the_target_empty(tmp_path: Path) -> None:
    content = recipe() | {"target": {}}
    with pytest.raises(RecipeError, match="target: no size is given"):
        load_recipe(write_recipe(tmp_path / "r.yaml", content))
    load_recipe(write_recipe(tmp_path / "r.yaml", content | {"fuse": {"method": "keep"}}))
