"""`slimfuse diagnose`: of saved models, of a recipe, in the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_text
from tiny_run import parents_unexported, recipe, save_parent, unproved, write_recipe
from typer.testing import CliRunner

from slimfuse.cli import app
from slimfuse.errors import UserError
from slimfuse.pipeline import Run, compress, diagnose
from slimfuse.pipeline.diagnosing import Diagnosing, subject
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.why import read_tables, refit_table, write_tables
from slimfuse.recipe import load_recipe
from slimfuse.recipe.diagnosing import Diagnose
from slimfuse.report import from_json

TITLES = ("How narrow", "How the signal", "Whether it got brittle", "What to keep in float")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose")
    save_parent(folder / "wide", seed=1)
    save_parent(folder / "slim", seed=2, hidden_size=12)
    return folder


def test_saved_models_side_by_side(home: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["diagnose", str(home / "wide"), str(home / "slim"), "--data", "digits", "--samples", "4",
         "--seconds", "60", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    tables = json.loads(result.stdout)
    assert [any(t["title"].startswith(s) for s in TITLES) for t in tables] == [True] * 4
    narrow, signal, slope, tensor = tables
    assert all(t["decision"] and t["conditions"] for t in tables)
    assert len(narrow["rows"]) == 3 * 2 and "of child" in tensor["title"]
    assert {row[0].split(",")[0] for row in signal["rows"]} == {"parent", "child"}
    assert [row[1] for row in slope["rows"][:2]] == ["4", "4"]
    assert tensor["rows"][-1][0] == "all together"


def test_texts_and_time_that_is_over(tmp_path: Path) -> None:
    tiny_text.save_texts(tmp_path / "data", (30, 20))
    tiny_text.save_parent(tmp_path / "texts")
    found = diagnose(tmp_path / "texts", data=str(tmp_path / "data"), samples=20, seconds=1e-3)
    assert len(found.tables) == 4
    # two passes at least, whatever the time
    assert found.tables[3].conditions.startswith("2 probes")


@pytest.mark.parametrize(
    ("models", "keys", "told"),
    [
        ((), {}, "nothing to diagnose"),
        (("wide",), {}, "no data"),
        (("wide",), {"data": "nowhere"}, "no such data"),
        (("wide",), {"data": "digits", "family": "vitt"}, "no such model and task"),
        (("wid",), {"data": "digits"}, "no model here"),
        (("wide",), {"data": "digits", "overrides": ("foo.bar=1",)}, "no recipe to change"),
        (("wide",), {"data": "digits", "out": "x"}, "no recipe to change"),
        (("wide",), {"data": "digits", "samples": 1}, "out of range"),
        (("a.yaml", "b.yaml"), {}, "a recipe stands alone"),
        (("a.yaml",), {"data": "digits"}, "a recipe stands alone"),
    ],
)
def test_bad_input_is_one_clear_error(
    home: Path, models: tuple[str, ...], keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        diagnose(*(home / m for m in models), **keys)


@pytest.fixture(scope="module")
def ran(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    given = recipe(
        parents=[{"name": n, "from": n} for n in ("wide", "slim")], baselines=[],
        target={"hidden_size": 8, "intermediate_size": 12}, fuse={"ridge": "auto"},
        diagnose={"samples": 4, "seconds": 30.0}, finetune={"epochs": 1, "batch_size": 32},
        export={"quantize": {"mode": "none"}},
    )  # fmt: skip
    path = write_recipe(home / "why.yaml", given)
    with pytest.MonkeyPatch.context() as patch:
        parents_unexported(patch)
        unproved(patch)
        return compress(path, out=tmp_path_factory.mktemp("runs") / "why")


def test_the_report_says_why(ran: Run) -> None:
    titles = [f.title for f in ran.report.findings if f.group == "why"]
    assert len(titles) == 5 and titles[4] == "Whether the calibration set was enough"
    html = (ran.folder / "report.html").read_text()
    assert re.search(r'<h2 id="group-\d">Why</h2>', html) and "How narrow wide can be" in html
    again = from_json((ran.folder / "report.json").read_text())
    assert again.findings == ran.report.findings


def test_a_recipe_is_diagnosed_with_its_finished_child(ran: Run, home: Path) -> None:
    found = diagnose(home / "why.yaml", samples=4, seconds=30.0, out=ran.folder)
    models = {row[0].split(",")[0] for row in found.tables[1].rows}
    assert models == {"wide", "slim", "child"}


def test_tables_are_read_back(ran: Run, tmp_path: Path) -> None:
    write_tables(ran.report.findings, tmp_path / "t.json")
    assert read_tables(tmp_path / "t.json") == ran.report.findings


def test_a_refit_that_did_not_help_asks_for_samples() -> None:
    def part(strength: float | str, left: float) -> dict[str, Any]:
        return {"layer": 0, "part": "mlp", "strength": strength, "left_out": left, "kept": 0.5}

    (good,) = refit_table({"parts": [part(1e-3, 0.1)]}, 9)
    (bad,) = refit_table({"parts": [part(1e-3, 0.1), part("untouched", 0.5)]}, 9)
    assert "is enough" in good.decision and "1 of 2 parts" in bad.decision
    assert bad.rows[1][-1] == "as it was"
    assert refit_table({"parts": [{"left_out": None}]}, 9) == ()


def test_of_many_tokens_fewer_samples_are_in_a_pass(
    finished: Run, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(load_recipe(tiny_recipe), tiny_recipe)
    tokens = job.opened.tokens(job.parents[0].config)
    for each in (1, 3):
        monkeypatch.setattr("slimfuse.pipeline.diagnosing.TOKENS", each * tokens)
        seen = Diagnosing(job, Diagnose(samples=7), [subject(job, "child", finished.model)])
        assert {len(chunk) for chunk in seen.chunks[:2]} == {each}
        assert seen.count == 7  # nothing is left out
