"""What a notebook shows of a report."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.fakes import fake_report, fake_sweep
from report.test_page import Page

from slimfuse.pipeline import Run
from slimfuse.pipeline.comparison import Comparison, Entry, markdown
from slimfuse.pipeline.planning import Plan, Planned
from slimfuse.pipeline.sweep_verb import Sweep
from slimfuse.report import verdict
from slimfuse.report.compare import compare

EVIL = "<script>alert(1)</script>"


def test_a_report_and_a_run_show_their_verdict_and_rows() -> None:
    report = fake_report()
    html = report._repr_html_()
    text = Page(html).text
    assert verdict(report) in text and "✗ failed" in text
    for row in report.rows:
        assert row.name in text
    assert "2.11× 2.05–2.19" in text
    run = Run(Path("runs/x"), Path("runs/x/model"), report)
    assert "runs/x/report.html" in run._repr_html_()


def test_a_sweep_shows_its_pick_and_candidates() -> None:
    report = fake_sweep()
    text = Page(Sweep(Path("runs/s"), report, {})._repr_html_()).text
    for told in ("pick: half", "the only candidate", "2.00× 1.90–2.10", "vit-a", "pick, front",
                 "runs/s/sweep.html"):  # fmt: skip
        assert told in text
    assert "runs/s" not in report._repr_html_()


def test_a_plan_shows_its_models_and_needs() -> None:
    child = Planned("child", "2 layers, 64 wide", 1_197_834, 117_000_000, 4_791_336, 300)
    plan = Plan((child,), 2_000_000_000, 1_000_000, None, False, (f"note {EVIL}",))
    html = plan._repr_html_()
    text = Page(html).text
    for told in ("2 layers, 64 wide", "1.2 M", "4.8 MB", "300", "2.0 GB", EVIL):
        assert told in text
    assert EVIL not in html and html.count("<table>") == 1


def test_a_comparison_shows_the_table_that_it_writes() -> None:
    entries = tuple(Entry(n, "method", {0: {0: v, 1: v + 0.02}})
                    for n, v in (("refit", 0.8), ("vanilla", 0.6)))  # fmt: skip
    found = Comparison("r", "refit", (0, 1), (0,), 500, entries, {"ot": "no anchor"})
    text, written = Page(found._repr_html_()).text, markdown(found)
    for row in (line for line in written.splitlines() if line.startswith("| ")):
        assert all(cell.strip() in text for cell in row.split("|") if set(cell) - set(" -"))
    assert "left out: ot: no anchor" in text and "lead of refit, paired" in text


@pytest.mark.parametrize("name", ["plain", EVIL])
def test_the_fragment_is_small_and_loads_nothing(name: str) -> None:
    report = fake_report(name=name)
    for html in (report._repr_html_(), compare({"a": report, "b": report})._repr_html_()):
        assert len(html.encode()) < 20_000  # 12 rows of text
        tags = {tag for tag, _ in Page(html).tags}
        assert not tags & {"script", "style", "img", "link", "html", "body"}
        assert "http" not in html and EVIL not in html
        # a notebook's theme is not the browser's: colours are those around it
        assert "#" not in html.replace("&#", "")
