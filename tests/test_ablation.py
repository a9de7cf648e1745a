"""`compare --vary`: a row for every value of a key, nothing made twice."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_comparison import ALONE, SHALLOW_ALONE, made
from tiny_run import events, recipe, write_recipe

from slimfuse.errors import ShapeError, UserError
from slimfuse.pipeline.comparison import Comparison, compare, lead, markdown
from slimfuse.pipeline.contenders import ablation, variations
from slimfuse.recipe import InvalidRecipe

VARY = ("fuse.units=cholesky,saliency", "fuse.stream=pca,select")
CHANGED = ("fuse.units=cholesky", "fuse.units=saliency", "fuse.stream=pca", "fuse.stream=select")


def test_values_are_parted_by_commas_outside_brackets_and_quotes() -> None:
    assert variations(["fuse.layers=[[0], [1]],[[0, 1]]", "data.path='a,b'"]) == (
        "fuse.layers=[[0], [1]]", "fuse.layers=[[0, 1]]", "data.path='a,b'",
    )  # fmt: skip
    assert variations(["parents[0].weight=1, 2,1"]) == ("parents.0.weight=1", "parents.0.weight=2")
    assert variations(VARY) == CHANGED


@pytest.mark.parametrize("option", ["fuse.units", "=a,b", "fuse.units=", "fuse.units=a,,b"])
def test_another_form_is_refused(option: str) -> None:
    with pytest.raises(UserError, match="not a key and its values") as error:
        variations([option])
    assert (error.value.where, error.value.got) == ("--vary", option)


@pytest.mark.parametrize("key", ["bench.min_seconds", "finetune.epochs", "runtime.threads", "name"])
def test_keys_that_change_no_figure_are_refused(key: str) -> None:
    with pytest.raises(UserError, match="can differ by this key") as error:
        variations([f"{key}=1,2"])
    assert error.value.hint is not None
    assert ("--steps" in error.value.hint) == (key == "finetune.epochs")


def test_an_ablation_is_the_recipe_with_one_key_changed() -> None:
    variants = {"fuse.units=ot": made(fuse={"units": "ot"})}
    first, row, control = ablation(made(), variants)
    assert (first.name, first.kind) == ("refit, a + b", "method")
    assert (row.name, row.kind, row.trains) == ("fuse.units=ot", "ablation", True)
    assert row.recipe.fuse == first.recipe.fuse.model_copy(update={"units": "ot"})
    assert (control.start, control.trains) == ("random-refit", False)
    assert len(ablation(made(fuse={"method": "subclone"}), variants)) == 2


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Comparison]:
    """A recipe, the folder of its ablation with two seeds, and what came out."""
    root = tmp_path_factory.mktemp("ablate")
    spec = recipe(parents=SHALLOW_ALONE, data={"limit": {"train": 100, "test": 40}})
    path = write_recipe(root / "tiny.yaml", spec)
    return path, root / "out", compare(
        path, seeds=(0, 1), steps=(0, 2), vary=VARY, out=root / "out"
    )  # fmt: skip


def test_an_ablation_has_a_row_for_the_recipe_and_every_value(
    ablated: tuple[Path, Path, Comparison],
) -> None:
    _, out, found = ablated
    assert {e.name: e.kind for e in found.entries} == {
        "parent a": "parent", "refit, a": "method",
        **dict.fromkeys(CHANGED, "ablation"), "random model + the same refit": "control",
    }  # fmt: skip
    assert found.own == "refit, a" and found.vary == CHANGED and not found.refused
    rows = {e.name: e.figures for e in found.entries}
    for name in ("refit, a", *CHANGED):
        assert {b: set(values) for b, values in rows[name].items()} == {0: {0, 1}, 2: {0, 1}}
    for same in ("fuse.units=cholesky", "fuse.stream=pca"):  # as the recipe has them
        assert rows[same] == rows["refit, a"]
    assert rows["fuse.stream=select"][0] != rows["refit, a"][0]
    text = (out / "ablation.md").read_text()
    assert text == markdown(found) and text.startswith("# tiny: ablations at equal budgets")
    kept = json.loads((out / "ablation.json").read_text())
    assert kept == json.loads(json.dumps(asdict(found)))
    ahead = lead(rows["refit, a"][0], rows["fuse.stream=select"][0])
    assert ahead is not None and f"({100 * ahead[0]:+.2f}, " in text


def test_an_ablation_trains_a_parent_once_and_makes_nothing_twice(
    ablated: tuple[Path, Path, Comparison],
) -> None:
    path, out, found = ablated
    for seed in (0, 1):
        stages = events(out / f"seed-{seed}", "start")
        trained = [s for s in stages if s.startswith("parent-")]
        assert trained == ["parent-a"]
        assert stages.count("fused") == stages.count("finetuned") == 3  # two are the recipe's own
    before = [events(out / f"seed-{s}", "start") for s in (0, 1)]
    assert compare(path, seeds=(0, 1), steps=(0, 2), vary=VARY, out=out) == found
    assert [events(out / f"seed-{s}", "start") for s in (0, 1)] == before


def test_targets_and_data_may_vary_but_not_the_test_set(
    ablated: tuple[Path, Path, Comparison],
) -> None:
    path, out, _ = ablated
    vary = ("target.hidden_size=12", "data.calibration.samples=20", "data.limit.train=80")
    found = compare(path, seeds=(0,), steps=(0,), vary=vary, out=out)
    assert not found.refused and {e.name for e in found.entries} >= {*vary}
    with pytest.raises(UserError, match="other samples than the recipe") as error:
        compare(path, seeds=(0,), steps=(0,), vary=("data.limit.test=30",), out=out)
    assert error.value.got == "data.limit.test=30"


@pytest.mark.parametrize(
    ("vary", "error", "words"),
    [
        ("fuse.unit=ot", InvalidRecipe, "did you mean 'units'"),
        ("fuse.units=ot,best", InvalidRecipe, "fuse.units=best: fuse.units: "),
        ("target.hidden_size=3", ShapeError, "hidden_size"),
    ],
)
def test_a_bad_key_or_value_is_the_recipes_own_error_before_any_work(
    vary: str, error: type[UserError], words: str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", recipe(parents=ALONE))
    with pytest.raises(error) as found:
        compare(path, vary=(vary,), out=tmp_path / "out")
    assert words in str(found.value)
    assert not (tmp_path / "out" / "seed-0" / "log.jsonl").exists()


def test_the_command_line_takes_what_varies(
    ablated: tuple[Path, Path, Comparison],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from slimfuse import cli

    path, out, _ = ablated
    asked = [w for v in VARY for w in ("--vary", v)]
    monkeypatch.setattr("sys.argv", ["slimfuse", "compare", str(path), "--seeds", "1", "--steps",
                                     "0,2", "--out", str(out), *asked])  # fmt: skip
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "ablations at equal budgets" in shown and "fuse.units=saliency" in shown
