"""Finished runs on disk: their pages are drawn again, and what is no run is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from report.fakes import fake_example, fake_report, fake_sweep, quick_report
from report.test_page import Page

from slimfuse.errors import UserError
from slimfuse.report import compare_runs, folders, load, redraw, to_json, verdict
from slimfuse.report.sweep_rows import SCHEMA as SWEEP

Ran = tuple[int, str, str]


@pytest.fixture
def run(run: Callable[..., Ran]) -> Callable[..., Ran]:
    """Run `slimfuse report ARGUMENTS` here; returns exit code, stdout and stderr."""
    return partial(run, "report")


def folder(root: Path, name: str = "run", text: str | None = None) -> Path:
    (root / name).mkdir()
    report = quick_report(name=name)
    (root / name / "report.json").write_text(to_json(report) if text is None else text)
    return root / name


def test_a_page_is_drawn_again_from_its_figures(tmp_path: Path, run: Callable[..., Ran]) -> None:
    home = folder(tmp_path)
    code, out, _ = run(home)
    assert code == 0 and f"report: {home / 'report.html'}" in out and "87.9 ± 0.6" in out
    page = (home / "report.html").read_text()
    assert verdict(quick_report()) in Page(page).text and "From parent vit-a" in page


def test_a_page_for_others_can_do_without_samples(tmp_path: Path, run: Callable[..., Ran]) -> None:
    home = folder(tmp_path, text=to_json(quick_report(examples=(fake_example(),))))
    for option, shown in (("--no-examples", False), ("--examples", True)):
        code, *_ = run(home, option)
        page = (home / "report.html").read_text()
        assert code == 0 and ("sandal (61%)" in page) == shown == ("image/png" in page)
    assert load(home).examples, "the figures stay as they are"


def test_page_and_figures_go_where_they_are_wanted(
    tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = folder(tmp_path)
    monkeypatch.setattr(folders, "_KINDS", [replace(folders._KINDS[0], render=lambda _: "page")])
    code, out, err = run(home / "report.json", "--out", tmp_path / "x.html", "--json")
    assert code == 0 and (tmp_path / "x.html").read_text() == "page" and "report:" in err
    assert json.loads(out) == json.loads((home / "report.json").read_text())
    assert not (home / "report.html").exists()


def test_a_sweeps_page_is_drawn_again(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(to_json(fake_sweep(), SWEEP))
    assert load(tmp_path) == fake_sweep()
    page = redraw(tmp_path)
    assert page.name == "sweep.html" and "the only candidate" in page.read_text()
    with pytest.raises(UserError, match="compares its own candidates"):
        compare_runs([tmp_path, folder(tmp_path)])


def test_several_runs_are_compared(
    tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path, "a"), folder(tmp_path, "b")
    code, out, err = run("a", "b", "--json")
    assert code == 0 and "report: comparison.html" in err and "overlaps" in err
    assert json.loads(out)["schema"] == "slimfuse.runs/1"
    assert "2 runs compared" in Path("comparison.html").read_text()
    code, _, err = run("a", "./a")
    assert code == 2 and "named twice" in err


BAD = {
    "nothing": (None, "there is no such folder"),
    "empty folder": ("", "there is no finished run here"),
    "no JSON": ("{", "this is not JSON"),
    "another version": ('{"schema": "slimfuse.report/9"}', "slimfuse.report/9"),
    "another thing": ("[]", "not a slimfuse report"),
    "deep": ("[" * 100_000, "no report"),
    "not text": ("\udcff", "not UTF-8"),
    "damaged": (to_json(fake_report()).replace('"bytes"', '"bites"'), "rows[0].bytes: missing"),
    "odd rows": (
        to_json(fake_report(speedups=())).replace('"vit-b"', '"vit-a"'), "2 rows are named"
    ),
    "odd picture": (
        to_json(fake_report(4)).replace('"values": [', '"values": ["x",').replace(
            '"labels": [', '"labels": ["x",'), "holds what is no number"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_what_is_no_run_gets_one_clear_error(
    tmp_path: Path, run: Callable[..., Ran], kind: str, beside: bool
) -> None:
    text, what = BAD[kind]
    home = tmp_path / "bad"
    if text is not None:
        home.mkdir()
        if text:
            (home / "report.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    others = [folder(tmp_path, "good")] if beside else []
    code, out, err = run(*others, home, "--out", tmp_path / "page.html")
    assert code == 2 and out == "" and what in err and str(home) in err
    assert "Traceback" not in err and err.count("error:") == 1
    assert not (tmp_path / "page.html").exists()


def test_a_finished_run_is_drawn_as_it_was(finished: object, tmp_path: Path) -> None:
    home = finished.folder  # type: ignore[attr-defined]
    assert redraw(home, tmp_path / "p.html").read_text() == (home / "report.html").read_text()
