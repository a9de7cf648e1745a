"""`compare`: who takes part, equal budgets, the table and its intervals, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny_comparison import ALONE, SHALLOW_ALONE, SHALLOW_PAIR, made
from tiny_run import events, recipe, write_recipe

from slimfuse.errors import ParentError, UserError
from slimfuse.pipeline import comparison
from slimfuse.pipeline.comparison import Comparison, Entry, compare, interval, lead, markdown
from slimfuse.pipeline.contenders import ladder
from slimfuse.recipe import Recipe


def titles(spec: Recipe, best: str = "b") -> list[str]:
    return [c.name for c in ladder(spec, best, "copy", "untrained")]


def test_the_ladder_of_two_parents() -> None:
    found = ladder(made(), "b", "copy", "untrained")
    assert {c.name: (c.recipe.fuse.method, c.recipe.fuse.parents, c.trains) for c in found} == {
        "refit, a + b": ("refit", ("a", "b"), True),
        "refit, best parent": ("refit", ("b",), True),
        "gauge, a + b": ("gauge", ("a", "b"), True),
        "ot, a + b": ("ot", ("a", "b"), True),
        "intra, best parent": ("intra", ("b",), True),
        "vanilla, a + b": ("vanilla", ("a", "b"), True),
        "select, best parent": ("select", ("b",), True),
        "subclone, best parent": ("subclone", ("b",), True),
        "random start": ("random", ("b",), True),
        "self-fusion of best parent": ("refit", ("b", "_again"), False),
        "refit, random-weight parent": ("refit", ("_untrained",), False),
        "random model + the same refit": ("refit", ("a", "b"), False),
    }
    assert {c.start for c in found if c.trains} == {"fused"}
    assert next(c.start for c in found if "random model" in c.name) == "random-refit"
    for contender in found:
        one = contender.recipe
        assert one.baselines == ()
        assert one.finetune.distill.teachers in (None, ("a", "b"))  # the same for all
        strangers = {p.name: p.from_ for p in one.parents} | {"a": None, "b": None}
        assert strangers.keys() - {"a", "b"} <= set(one.fuse.parents or ())
    froms = {p.name: p.from_ for c in found for p in c.recipe.parents if p.from_}
    assert froms == {"_again": "copy", "_untrained": "untrained"}


def test_titles_do_not_depend_on_which_parent_is_best() -> None:
    assert titles(made(), "a") == titles(made(), "b")


def test_the_ladder_of_one_parent() -> None:
    assert titles(made(parents=ALONE), "a") == [
        "refit, a", "ot, a", "intra, a", "vanilla, a", "select, a", "subclone, a", "random start",
        "self-fusion of a", "refit, random-weight parent", "random model + the same refit",
    ]  # fmt: skip


def test_the_ladder_keeps_to_the_parents_that_are_fused() -> None:
    found = titles(made(fuse={"parents": ["a"]}), "a")
    assert found[0] == "refit, a" and not [t for t in found if "b" in t.split(", ")[-1].split()]


def test_the_recipes_own_method_is_first_with_its_settings() -> None:
    found = ladder(made(fuse={"method": "gauge", "ridge": 0.1}), "a", "x", "y")
    assert [c.name for c in found[:3]] == ["gauge, a + b", "gauge, best parent", "refit, a + b"]
    assert {c.recipe.fuse.ridge for c in found} == {0.1}


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_interval_over_seeds_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(0.8, 0.05, n).tolist()
    mean, low, high = interval(values, 60)
    wanted = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
    # float64, the same formula in another order
    assert (mean, low, high) == pytest.approx((np.mean(values), *wanted), rel=1e-12)


def test_the_interval_of_one_seed_is_wilsons() -> None:
    mean, low, high = interval([0.75], 60)
    z, n, p = stats.norm.ppf(0.975), 60, 0.75
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # float64, Wilson's closed form
    assert (mean, low, high) == pytest.approx((p, centre - half, centre + half), rel=1e-9)


def test_the_lead_is_the_paired_t_interval() -> None:
    first, other = {0: 0.82, 1: 0.80, 2: 0.85}, {2: 0.72, 0: 0.70, 1: 0.75}
    found = lead(first, other)
    paired = stats.ttest_rel([0.82, 0.80, 0.85], [0.70, 0.75, 0.72]).confidence_interval(0.95)
    assert found is not None
    assert found == pytest.approx((0.1, paired.low, paired.high), rel=1e-9)
    assert lead({0: 0.8}, {0: 0.7}) is None
    assert lead({0: 0.8, 1: 0.8}, {1: 0.7, 2: 0.7}) is None  # one seed in common
    alike = lead({0: 0.9, 1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.5})  # failed with seed 0: not counted
    assert alike == pytest.approx((0.1, 0.1, 0.1))


def test_the_table_shows_means_leads_and_refusals() -> None:
    ours = Entry("refit, a + b", "method", {0: {0: 0.5, 1: 0.6}, 10: {0: 0.8, 1: 0.8}})
    random = Entry("random start", "method", {0: {0: 0.1, 1: 0.1}, 10: {0: 0.5, 1: 0.6}})
    parent = Entry("parent a", "parent", {0: {0: 0.9, 1: 0.92}})
    refused = {"ot, a + b": "no anchor"}
    listed = (parent, ours, random)
    text = markdown(Comparison("x", "refit, a + b", (0, 1), (0, 10), 1234, listed, refused))
    lines = text.splitlines()
    assert lines[0] == "# x: methods and controls at equal budgets"
    assert "1,234 test samples, seeds 0, 1" in text
    assert "| model | one-shot | 10 steps |" in lines
    half = stats.t.ppf(0.975, 1) * 0.05 / 1  # deviation 0.0707 over √2
    alike = stats.binomtest(987, 1234).proportion_ci(method="wilson")  # no seed changes it
    wilson = 50 * (alike.high - alike.low)
    assert f"| refit, a + b | 55.00 ± {100 * half:.2f} | 80.00 ± {wilson:.2f} |" in lines
    row = next(line for line in lines if line.startswith("| random start"))
    assert f"(+45.00, {100 * (0.45 - half):+.2f} … {100 * (0.45 + half):+.2f})" in row
    assert f"| parent a | 91.00 ± {100 * stats.t.ppf(0.975, 1) * 0.01:.2f}" in text
    assert next(line for line in lines if line.startswith("| parent a")).endswith("|  |")
    assert "- refit, a + b: 0 steps: 50.00, 60.00; 10 steps: 80.00, 80.00" in lines
    assert lines[-1] == "- ot, a + b: no anchor"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Comparison]:
    """A recipe, the folder of its comparison with two seeds, and what came out."""
    root = tmp_path_factory.mktemp("compare")
    spec = recipe(
        parents=SHALLOW_PAIR, baselines=["subclone"], data={"limit": {"train": 100, "test": 40}}
    )
    path = write_recipe(root / "tiny.yaml", spec)
    return path, root / "out", compare(path, seeds=(0, 1), steps=(2, 0), out=root / "out")


def test_every_contender_has_a_figure_a_seed_and_a_budget(
    compared: tuple[Path, Path, Comparison],
) -> None:
    _, out, found = compared
    assert (found.name, found.seeds, found.budgets, found.samples) == ("tiny", (0, 1), (0, 2), 40)
    kinds = {e.name: e.kind for e in found.entries}
    assert kinds == {
        "parent a": "parent", "parent b": "parent", "refit, a + b": "method",
        "refit, best parent": "method", "gauge, a + b": "method", "intra, best parent": "method",
        "select, best parent": "method",
        "subclone, best parent": "method", "random start": "method",
        "self-fusion of best parent": "control", "refit, random-weight parent": "control",
        "random model + the same refit": "control",
    }  # fmt: skip
    for entry in found.entries:
        budgets = (0, 2) if entry.kind == "method" else (0,)
        assert tuple(sorted(entry.figures)) == budgets, entry.name
        for values in entry.figures.values():
            assert len(values) == 2
            assert all(0 <= v <= 1 and round(40 * v, 9) % 1 == 0 for v in values)
    assert found.refused.keys() == {"ot, a + b", "vanilla, a + b"}
    assert "none is given" in found.refused["ot, a + b"]
    assert "one shape" in found.refused["vanilla, a + b"]
    kept = json.loads((out / "compare.json").read_text())
    assert kept == json.loads(json.dumps(asdict(found)))
    assert (out / "compare.md").read_text() == markdown(found)


def test_seeds_have_parents_calibration_and_order_of_their_own(
    compared: tuple[Path, Path, Comparison],
) -> None:
    _, out, _ = compared
    seeds = {}
    for seed in (0, 1):
        lock = load_recipe_of(out / f"seed-{seed}" / "recipe.lock.yaml")
        trained = [p["train"]["seed"] for p in lock["parents"]]
        seeds[seed] = (*trained, lock["data"]["calibration"]["seed"], lock["finetune"]["seed"],
                       lock["runtime"]["seed"])  # fmt: skip
    assert seeds == {0: (0, 1, 0, 0, 0), 1: (100, 101, 1, 1, 1)}


def load_recipe_of(lock: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    found: dict[str, Any] = YAML(typ="safe").load(lock.read_text())["recipe"]
    return found


def test_a_second_comparison_does_no_work(compared: tuple[Path, Path, Comparison]) -> None:
    path, out, found = compared
    before = [events(out / f"seed-{s}", "start") for s in (0, 1)]
    assert before[0] and before[1]
    again = compare(path, seeds=range(2), steps=(0, 2), out=out)
    assert again == found
    assert [events(out / f"seed-{s}", "start") for s in (0, 1)] == before


def test_no_model_is_trained_twice(compared: tuple[Path, Path, Comparison]) -> None:
    _, out, _ = compared
    for seed in (0, 1):
        trained = [s for s in events(out / f"seed-{seed}", "start") if s.startswith("parent-")]
        assert trained == ["parent-a", "parent-b"]  # self-fusion takes the folder that is there


def test_a_single_parent_and_seeds_in_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    original = comparison.prepare_again

    def prepare_again(spec: Recipe, *more: Any) -> Any:
        seen.append(spec.finetune.lr)
        return original(spec, *more)

    monkeypatch.setattr(comparison, "prepare_again", prepare_again)
    path = write_recipe(
        tmp_path / "one.yaml",
        recipe(
            parents=SHALLOW_ALONE, data={"limit": {"train": 60, "test": 40}}, finetune={"epochs": 1}
        ),
    )
    found = compare(path, seeds=(1, 3), overrides=("finetune.lr=1e-{seed}",), out=tmp_path / "out")
    assert seen == [0.1, 0.001]
    assert found.budgets == (0, 2) and found.seeds == (1, 3)  # the recipe's own two steps
    names = [e.name for e in found.entries]
    assert names[:2] == ["parent a", "refit, a"] and "self-fusion of a" in names
    assert not [n for n in names if "best" in n or "gauge" in n]


def test_an_error_of_the_recipe_tells_its_line(tmp_path: Path) -> None:
    parents = [{"name": "a", "from": "gone/away/x"}]
    path = write_recipe(tmp_path / "bad.yaml", recipe(parents=parents))
    with pytest.raises(ParentError, match="does not exist") as error:
        compare(path, out=tmp_path / "out")
    assert f"{path.name}:" in str(error.value.where)
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_seeds_and_steps(
    compared: tuple[Path, Path, Comparison],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from slimfuse import cli

    path, out, _ = compared

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["slimfuse", "compare", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert isinstance(done.value.code, int)
        return done.value.code, *capsys.readouterr()

    code, shown, _ = run(path, "--seeds", 2, "--steps", "0,2", "--out", out)
    assert code == 0
    for words in ("methods and controls at equal budgets", "refit, a + b", "one-shot", "2 steps"):
        assert words in shown
    code, _, told = run(path, "--steps", "0,x")
    assert code == 2 and "--steps" in told and "0,300,1000" in told
    code, _, told = run(path, "--seeds", 0)
    assert code == 2


def test_a_failing_contender_does_not_end_the_comparison(
    compared: tuple[Path, Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, found = compared

    def fail(wanted: str) -> Callable[..., Any]:
        original = comparison.prepare

        def prepare(spec: Recipe, *more: Any) -> Any:
            if spec.fuse.method == wanted:
                raise UserError("it can't be made", got="this")
            return original(spec, *more)

        return prepare

    monkeypatch.setattr(comparison, "prepare", fail("select"))
    again = compare(path, seeds=(0,), steps=(0,), out=out)
    assert again.refused["select, best parent"] == "it can't be made (this)"
    assert {e.name for e in again.entries} == {e.name for e in found.entries} - {
        "select, best parent"
    }
