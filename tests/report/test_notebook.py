"""What a notebook shows of a report."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.fakes import fake_report
from report.test_page import Page

from slimfuse.pipeline import Run
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
