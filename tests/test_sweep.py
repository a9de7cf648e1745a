"""`sweep`: what is shared, what every candidate leaves, the page, resuming, bad input."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_pipeline_resume import at_start, patch
from tiny_comparison import SHALLOW_ALONE
from tiny_run import (
    die,
    events,
    folder_bytes,
    in_child,
    recipe,
    undrawn,
    unproved,
    was_killed,
    write_recipe,
)

import slimfuse
from slimfuse import cli
from slimfuse.errors import CheckFailed, ShapeError, StorageError, UserError
from slimfuse.pipeline import Sweep, compress, sweep, sweep_verb
from slimfuse.pipeline.sweep_verb import LOCK, RESULTS
from slimfuse.recipe import InvalidRecipe
from slimfuse.report import render_sweep
from slimfuse.store import Store

Swept = tuple[Path, Path, Sweep]
SIZE = "target.hidden_size=0.75,0.5"
NAMES = ["hidden_size=0.75", "hidden_size=0.5"]


@pytest.fixture(scope="module")
def patched() -> Any:
    """No folder is proved by another interpreter, no candidate's page drawn: see the tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        unproved(patch)
        undrawn(patch)
        yield patch


@pytest.fixture(scope="module")
def swept(patched: Any, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A recipe, the folder of its sweep over two widths, and what came out."""
    root = tmp_path_factory.mktemp("sweep")
    spec = recipe(
        parents=SHALLOW_ALONE,
        data={"limit": {"train": 100, "test": 40}},
        baselines=["select"],
        export={"quantize": {"mode": "none"}},
        gates=[{"metric": "params", "max_ratio": 0.5}],
    )
    path = write_recipe(root / "my recipe.yaml", spec)
    return path, root / "out", sweep(path, vary=(SIZE,), out=root / "out")


@pytest.fixture
def copied(swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished sweep's folder; pages are not drawn again."""
    undrawn(monkeypatch)
    monkeypatch.setattr(sweep_verb, "render_sweep", lambda _report: "<html>")
    return Path(shutil.copytree(swept[1], tmp_path / "again"))


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["slimfuse", "sweep", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert isinstance(done.value.code, int)
    return done.value.code


# -- what a sweep makes -------------------------------------------------------------------------


def test_parents_and_answers_are_made_once_for_all(swept: Swept) -> None:
    _, out, found = swept
    logs = [out, *(run.folder for run in found.runs.values())]
    started = [stage for log in logs for stage in events(log, "start")]
    once = ("parent-a", "outputs-a", "onnx-a", "bench")
    assert [started.count(stage) for stage in once] == [1, 1, 1, 1]
    assert started.count("fused") == started.count("finetuned") == 2
    assert not list(out.glob("candidates/*/stages"))


def test_every_candidate_is_a_run_of_its_own_that_compress_repeats(
    swept: Swept, copied: Path, tmp_path: Path
) -> None:
    path, out, found = swept
    assert list(found.runs) == NAMES
    for name in NAMES:
        assert {f.name for f in (out / "candidates" / name).iterdir()} >= {
            "model", "report.json", "report.html", LOCK.replace("sweep", "recipe"),
        }  # fmt: skip
    own = found.runs["hidden_size=0.5"].folder
    shutil.copytree(copied / "stages", tmp_path / "run" / "stages")
    shutil.copyfile(copied / "log.jsonl", tmp_path / "run" / "log.jsonl")
    alone = compress(path, overrides=("target.hidden_size=0.5",), out=tmp_path / "run")
    made = events(alone.folder, "start")[len(events(out, "start")) :]
    assert made == ["bench"]  # its latency alone is another figure: all else has the same address
    assert folder_bytes(alone.model) == folder_bytes(own / "model")
    lock = "recipe.lock.yaml"
    assert (alone.folder / lock).read_bytes() == (own / lock).read_bytes()
    swept_rows = {r.name: r.metrics for r in found.runs["hidden_size=0.5"].report.rows}
    assert {r.name: r.metrics for r in alone.report.rows} == swept_rows


def test_latencies_of_all_candidates_are_of_one_measurement(swept: Swept) -> None:
    _, out, found = swept
    benches = list(out.glob("stages/bench-*"))
    kept = json.loads((benches[0] / "bench.json").read_text())
    assert len(benches) == 1 and len(kept["latencies"]) == 3  # the parent's file and the children's
    assert len({entry["n"] for entry in kept["latencies"]}) == 1  # rounds in turns
    parents = [run.report.rows[0] for run in found.runs.values()]
    assert parents[0].name == "a" and parents[0] == parents[1]
    children = {r.name: r.latency for run in found.runs.values() for r in run.report.rows}
    assert children["onnx"] != parents[0].latency
    for run in found.runs.values():
        assert {(s.base, s.other) for s in run.report.speedups} == {("a", "onnx")}


def test_ratios_between_candidates_are_each_others_inverses(swept: Swept) -> None:
    ratios = {(s.base, s.other): s for s in swept[2].report.ratios}
    assert ratios.keys() == {(NAMES[0], NAMES[1]), (NAMES[1], NAMES[0])}
    one, other = (ratios[tuple(pair)] for pair in (NAMES, NAMES[::-1]))
    assert one.ratio * other.ratio == pytest.approx(1)
    assert one.low * other.high == pytest.approx(1) and one.low <= one.ratio <= one.high
    p50 = {name: run.report.rows for name, run in swept[2].runs.items()}
    wide, slim = (next(r for r in p50[n] if r.name == "onnx").latency[0].p50_ms for n in NAMES)
    assert one.ratio == pytest.approx(wide / slim)


def test_the_only_one_that_passes_the_gate_is_picked(swept: Swept) -> None:
    _, _, found = swept
    report = found.report
    assert [c.passed for c in report.candidates] == [False, True]
    assert report.picked == NAMES[1] and found.passed and "1 of 2 passes the gate" in report.reason
    assert found.picked is found.runs[NAMES[1]]
    small = report.candidates[1]
    assert small.front and small.row.params < report.candidates[0].row.params
    assert small.row == next(r for r in found.picked.report.rows if r.name == "onnx")
    assert report.base == "a" and [row.name for row in report.parents] == ["a"]


def test_the_figures_are_kept_as_json(swept: Swept) -> None:
    _, out, found = swept
    kept = json.loads((out / "sweep.json").read_text())
    assert kept["schema"] == "slimfuse.sweep/1"
    assert (kept["picked"], kept["reason"]) == (found.report.picked, found.report.reason)
    for one, shown in zip(kept["candidates"], found.report.candidates, strict=True):
        report = json.loads((out / one["folder"] / "report.json").read_text())
        assert [r for r in report["rows"] if r["stage"] != "parent"] == one["rows"]
        assert one["overrides"] == list(shown.overrides) and one["shape"] == shown.shape


def test_the_page_opens_offline_and_shows_every_candidate(swept: Swept) -> None:
    _, out, found = swept
    html = (out / "sweep.html").read_text()
    assert html == render_sweep(found.report)
    assert not re.findall(r"(?:src|href|srcset)=\"(?!data:|#|candidates/)[^\"]*\"", html)
    assert "<script" not in html and html.count("<h1>") == 1 and 'lang="en"' in html
    for one in found.report.candidates:
        assert one.name in html and (out / one.folder / "report.html").is_file()
    links = re.findall(r"href=\"(candidates/[^\"]*)\"", html)
    assert links == [f"candidates/hidden_size%3D{size}/report.html" for size in ("0.75", "0.5")]
    pictures = re.findall(r"<img [^>]*>", html)
    assert len(pictures) == 2 and all('alt="Scatter plot' in picture for picture in pictures)
    assert html.count("prefers-color-scheme: dark") == 5  # the style, two pictures of two sizes


def test_names_are_escaped(swept: Swept) -> None:
    report = swept[2].report
    first = replace(report.candidates[0], name="<b>&amp;", folder='candidates/"x"')
    html = render_sweep(replace(report, candidates=(first,), name="<i>", picked="", ratios=()))
    assert "<b>&amp;" not in html and "&lt;b&gt;&amp;amp;" in html and "<i>" not in html
    assert "candidates/%22x%22/report.html" in html


# -- going on -----------------------------------------------------------------------------------


def test_a_second_sweep_does_no_work(swept: Swept, copied: Path) -> None:
    path, _, found = swept
    before = [events(f.parent, "start") for f in sorted(copied.rglob("log.jsonl"))]
    again = sweep(path, vary=(SIZE,), out=copied)
    assert [events(f.parent, "start") for f in sorted(copied.rglob("log.jsonl"))] == before
    assert replace(again.report, command="") == replace(found.report, command="")


def test_a_new_value_makes_only_its_candidate_and_times_all_anew(
    swept: Swept, copied: Path
) -> None:
    path, _, found = swept

    def work(arm: Callable[[], object]) -> None:
        arm()
        sweep(path, vary=(f"{SIZE},0.25",), out=copied)

    def killed(arm: Callable[[], object]) -> None:
        status = in_child(lambda: work(arm), copied.parent / "complaints")
        assert was_killed(status), (copied.parent / "complaints").read_text()
        assert not [name for name in RESULTS if (copied / name).exists()]

    killed(lambda: at_start("finetuned"))
    assert not (copied / "candidates" / "hidden_size=0.25" / "model").exists()
    killed(lambda: patch(sweep_verb, "publish", _second_time(die)))
    killed(lambda: patch(sweep_verb, "render_sweep", lambda *_: die()))
    more = sweep(path, vary=(f"{SIZE},0.25",), out=copied)
    logs = [copied, *(run.folder for run in more.runs.values())]
    done = [stage for log in logs for stage in events(log, "done")]
    assert [done.count(s) for s in ("parent-a", "finetuned", "bench")] == [1, 3, 2]
    for name in NAMES:
        mine = more.runs[name]
        assert folder_bytes(mine.model) == folder_bytes(found.runs[name].model)
        assert mine.report.rows[0].latency != found.runs[name].report.rows[0].latency
    assert len({run.report.rows[0].latency for run in more.runs.values()}) == 1
    assert len(more.report.candidates) == 3 and len(more.report.ratios) == 6


def _second_time(then: Callable[[], object]) -> Callable[..., None]:
    calls = []

    def check(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            then()

    return check


def test_one_process_at_a_time(swept: Swept, copied: Path) -> None:
    with Store(copied).lock(), pytest.raises(StorageError, match="another slimfuse process"):
        sweep(swept[0], vary=(SIZE,), out=copied)


def test_where_no_candidate_passes_the_nearest_is_named_and_the_exit_is_3(
    swept: Swept, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = "gates=[{metric: params, max_ratio: 0.01}]"
    code = run_cli(monkeypatch, swept[0], "--set", SIZE, "--set", gates, "--out", copied)
    shown = capsys.readouterr().out
    assert code == 3
    assert "none passes all gates; hidden_size=0.5 comes nearest: params" in shown
    assert "FAILED" in shown and "nearest, front" in shown and "model:" not in shown
    kept = json.loads((copied / "sweep.json").read_text())
    assert (kept["picked"], kept["nearest"]) == ("", NAMES[1])


def test_a_candidate_that_fails_its_check_is_left_out(
    swept: Swept, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, failing = sweep_verb.make, {"hidden_size=0.75", "hidden_size=0.5"}

    def fail(job: Any, store: Store, planned: Any) -> Any:
        if store.root.name in failing:
            raise CheckFailed("it gives other answers", got="nan")
        return make(job, store, planned)

    monkeypatch.setattr(sweep_verb, "make", fail)
    with pytest.raises(CheckFailed, match="other answers"):
        sweep(swept[0], vary=(SIZE,), out=copied)
    failing.remove("hidden_size=0.5")
    found = sweep(swept[0], vary=(SIZE,), out=copied)
    assert list(found.runs) == ["hidden_size=0.5"]
    told = "hidden_size=0.75 is left out: it gives other answers (nan)"
    assert found.report.warnings[0] == told


# -- the command line and bad input -------------------------------------------------------------


def test_the_command_line_shows_the_table_and_the_pick(
    swept: Swept, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, swept[0], "--set", SIZE, "--out", copied) == 0
    shown = capsys.readouterr().out
    for text in (*NAMES, "pick, front", "passed", "FAILED", "pick: hidden_size=0.5: 1 of 2 passes"):
        assert text in shown
    assert f"model:  {copied / 'candidates' / NAMES[1] / 'model'}" in shown
    assert f"report: {copied / 'sweep.html'}" in shown


def test_it_is_a_function_of_the_package() -> None:
    assert slimfuse.sweep is sweep and slimfuse.Sweep is Sweep


@pytest.mark.parametrize(
    ("vary", "error", "words"),
    [
        (("target.hidden_size=0.5",), UserError, "nothing varies"),
        ((), UserError, "nothing varies"),
        (("target.hiden_size=0.5,0.75",), InvalidRecipe, "did you mean 'hidden_size'"),
        (("fuse.units=best,worst",), InvalidRecipe, "fuse.units=worst: fuse.units"),
        (("target.hidden_size=3,999,0.5",), UserError, "2 of 3 candidates can't be made"),
        (("target.hidden_size=3,999",), UserError, "hidden_size=999:\n"),
        (("target.hidden_size=3,abc,0.5",), UserError, "2 of 3 candidates can't be made"),
        (("data.limit.test=20,30",), UserError, "different samples"),
        (("parents.0.name=b,c", "target.hidden_size=3"), ShapeError, "hidden_size"),
    ],
)
def test_bad_input_is_one_error_before_any_work(
    swept: Swept, vary: tuple[str, ...], error: type[UserError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as found:
        sweep(swept[0], vary=vary, out=tmp_path / "out")
    assert words in str(found.value) and found.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_results_is_left_alone(swept: Swept, tmp_path: Path) -> None:
    (tmp_path / "sweep.html").write_text("mine")
    with pytest.raises(StorageError, match="not a run folder") as error:
        sweep(swept[0], vary=(SIZE,), out=tmp_path)
    assert error.value.got == "sweep.html"
    assert [f.name for f in tmp_path.iterdir()] == ["sweep.html"]
