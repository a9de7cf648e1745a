"""A run made again from its lock: what is compared, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tiny_run import folder_bytes, recipe, save_parent, undrawn, unproved, write_recipe

from slimfuse.errors import DataError, ParentError, ShapeError, UserError
from slimfuse.pipeline import Run, reproduce_verb
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.lock import lock_of, lock_text, origins_in
from slimfuse.pipeline.reproduce_figures import compare_reports, differing
from slimfuse.pipeline.reproduce_verb import compared, reproduce
from slimfuse.recipe import Recipe, load_recipe
from slimfuse.report import Report


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stop a reproduction where its work would begin; the jobs that came so far."""
    jobs: list[Any] = []

    class Halt(Exception):
        pass

    def run(job: Any, *_: object) -> None:
        jobs.append(job)
        raise Halt

    monkeypatch.setattr(reproduce_verb, "run_job", run)
    monkeypatch.setattr(reproduce_verb, "Halt", Halt, raising=False)
    return jobs


def begun(*given: Any, **more: Any) -> None:
    with pytest.raises(reproduce_verb.Halt):  # type: ignore[attr-defined]
        reproduce(*given, **more)


@pytest.fixture
def of_saved(tmp_path: Path, finished: Run) -> Path:
    """What a run of two saved parents leaves: its lock, and a report with its command."""
    for name in ("one", "two"):
        save_parent(tmp_path / "models" / name, seed=len(name + name[:1]))
    parents = [{"name": n, "from": str(tmp_path / "models" / n)} for n in ("one", "two")]
    path = write_recipe(tmp_path / "recipe.yaml", recipe(parents=parents))
    loaded = load_recipe(path)
    assert isinstance(loaded, Recipe)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.lock.yaml").write_text(lock_text(prepare(loaded, path)))
    report = json.loads((finished.folder / "report.json").read_text())
    report["command"] = f"slimfuse compress '{path}'"
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_the_lock_makes_the_same_lock(finished: Run, tmp_path: Path, halted: list[Any]) -> None:
    before = folder_bytes(finished.folder)
    begun(finished.folder, out=tmp_path / "again")
    text = (tmp_path / "again" / "recipe.lock.yaml").read_text()
    assert text == (finished.folder / "recipe.lock.yaml").read_text()
    assert folder_bytes(finished.folder) == before
    (job,) = halted
    assert (job.threads, job.precision) == (1, "fp32")


def test_a_run_moves_with_its_parents(of_saved: Path, tmp_path: Path, halted: list[Any]) -> None:
    begun(of_saved)
    assert (tmp_path / "run-reproduced" / "recipe.lock.yaml").is_file()
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="doesn't say where this is") as caught:
        reproduce(of_saved)
    assert caught.value.got == "…/one" and "recipe.lock.yaml:" in str(caught.value.where)
    assert "--set parents.0.from=PATH" in str(caught.value.hint)
    (tmp_path / "models").rename(tmp_path / "moved")
    said = tuple(f"parents.{i}.from={tmp_path}/moved/{n}" for i, n in enumerate(("one", "two")))
    begun(of_saved, overrides=said)
    assert [job.parents[0].folder.parent.name for job in halted] == ["models", "moved"]
    assert lock_of(halted[0]) == lock_of(halted[1])
    with pytest.raises(UserError, match="changes no key") as caught:
        reproduce(of_saved, overrides=(*said, "finetune.epochs=1"))
    assert "parents.1.from" in str(caught.value.allowed)


def test_a_changed_recipe_is_not_followed(
    of_saved: Path, tmp_path: Path, halted: list[Any]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("epochs: 2", "epochs: 3"))
    with pytest.raises(UserError, match="doesn't say where this is"):
        reproduce(of_saved)  # the lock counts
    assert not halted


def test_a_tampered_parent_is_named(of_saved: Path, tmp_path: Path, halted: list[Any]) -> None:
    save_parent(tmp_path / "models" / "two", seed=9)
    with pytest.raises(ParentError, match="has changed") as caught:
        reproduce(of_saved)
    text = str(caught.value)
    assert "another sha256 of parent two's weights" in text and "recipe.lock.yaml" in text
    assert "one" not in str(caught.value.got) and not (tmp_path / "run-reproduced").exists()
    assert not halted


@pytest.mark.parametrize(
    ("keys", "value", "kind", "word"),
    [
        (("sha256", "data"), "0" * 64, DataError, "the data"),
        (("resolved", "target", "hidden_size"), 10, ShapeError, "another shape"),
    ],
)
def test_what_the_lock_says_otherwise_is_an_error(
    of_saved: Path, halted: list[Any], keys: tuple[str, ...], value: Any, kind: Any, word: str
) -> None:
    file = of_saved / "recipe.lock.yaml"
    lock = YAML(typ="safe").load(file.read_text())
    spot = lock
    for key in keys[:-1]:
        spot = spot[key]
    spot[keys[-1]] = value
    YAML(typ="safe").dump(lock, file)
    with pytest.raises(kind) as caught:
        reproduce(of_saved)
    assert word in str(caught.value) and not halted


@pytest.mark.parametrize(
    "text", ["", "[", "a: 1\n", "recipe: {}\n", "\0", "recipe: [1]\nsha256: 3"]
)
def test_a_damaged_lock_is_one_error(finished: Run, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "report.json", folder)
    (folder / "recipe.lock.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        reproduce(folder)
    assert "recipe.lock.yaml" in str(caught.value)


def test_no_run_and_no_folder_of_its_own_are_errors(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a finished run"):
        reproduce(tmp_path)
    for out in (finished.folder, finished.folder / "x", finished.folder.parent):
        with pytest.raises(UserError, match="a folder of its own"):
            reproduce(finished.folder, out=out)


def changed(report: Report, row: str, **more: Any) -> Report:
    """Return a report with one row's fields replaced; accuracy: that figure's value."""
    rows = []
    for one in report.rows:
        if one.name == row:
            figure = one.metrics["accuracy"]
            value = more.pop("accuracy", figure.value)
            metrics = {**one.metrics, "accuracy": replace(figure, value=value)}
            one = replace(one, metrics=metrics, **more)
        rows.append(one)
    return replace(report, rows=tuple(rows))


def test_equal_runs_are_the_same_and_a_latency_is_only_shown(finished: Run) -> None:
    report = finished.report
    assert differing(report, report) == ()
    same = compare_reports(report, report, exact=True)
    assert {one.what.partition(":")[0] for one in same} == {row.name for row in report.rows}
    judged = {one.same for one in same if "p50" not in one.what}
    assert judged == {True} and {one.same for one in same if "p50" in one.what} == {None}


def test_a_figure_that_moved_is_seen(finished: Run) -> None:
    report = finished.report
    before = next(row for row in report.rows if row.name == "finetuned").metrics["accuracy"]
    assert before.low is not None and before.high is not None
    near, far = (before.value + before.high) / 2, before.high + 0.01

    def same(value: float, *, exact: bool) -> bool | None:
        now = changed(report, "finetuned", accuracy=value)
        found = compare_reports(report, now, exact=exact)
        return next(one.same for one in found if one.what == "finetuned: accuracy")

    assert same(near, exact=False) and not same(near, exact=True)
    assert not same(far, exact=False)
    # of files that a latency may have chosen, as `optimize` does, no equal digits are asked
    moved = changed(report, "onnx-int8", accuracy=near)
    assert any(one.same is False for one in compare_reports(report, moved, exact=True))
    recipe = report.settings["recipe"]
    timed = {**recipe, "export": {**recipe["export"], "optimize": True}}
    chosen = replace(report, settings={**report.settings, "recipe": timed})
    assert all(one.same is not False for one in compare_reports(chosen, moved, exact=True))


def test_other_parameters_and_rows_that_came_or_went_are_seen(finished: Run) -> None:
    report = finished.report
    wrong = [
        one for one in compare_reports(report, changed(report, "fused", params=7), exact=False)
        if one.same is False
    ]  # fmt: skip
    assert [(one.what, one.now) for one in wrong] == [("fused: params", "7")]
    fewer = replace(report, rows=report.rows[1:], speedups=())
    for then, now in ((report, fewer), (fewer, report)):
        (one,) = [c for c in compare_reports(then, now, exact=True) if c.same is False]
        assert one.what == "a" and {one.then, one.now} == {"a row", "none"}


def test_other_weights_and_other_versions(finished: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "again"))
    made = replace(finished, folder=folder)
    found = compared(finished.folder, finished.report, made)
    assert found.reproduced and found.exact and found.figures[0].same
    (folder / "model" / "model.safetensors").write_bytes(b"other")
    assert not compared(finished.folder, finished.report, made).reproduced
    settings = {**finished.report.settings, "versions": {"torch": "0.1"}}
    older = replace(finished.report, settings=settings)
    found = compared(finished.folder, older, made)
    assert found.reproduced and not found.exact and found.figures[0].same is None
    assert ("torch", "0.1") in [(one.what, one.then) for one in found.conditions]


def test_origins_are_all_places_of_a_recipe(of_saved: Path) -> None:
    lock = YAML(typ="safe").load((of_saved / "recipe.lock.yaml").read_text())
    found = origins_in(lock["recipe"])
    assert {"data.path", "data.tokenizer", "parents.0.from", "parents.1.from"} == set(found)
    place, key = found["parents.1.from"]
    assert place[key] == "…/two"


@pytest.mark.slow
def test_the_tiny_run_reproduces_to_the_byte(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    unproved(monkeypatch)
    found = reproduce(finished.folder, out=tmp_path / "again")
    assert found.exact and found.reproduced, [f for f in found.figures if f.same is False]
    assert found.figures[0].same
