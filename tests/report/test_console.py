"""The report's table on a terminal."""

from __future__ import annotations

import dataclasses

import pytest
from report.fakes import CONDITIONS, fake_report, fake_rows, quick_report, without_intervals
from rich.console import Console

from slimfuse.report import (
    Report,
    console_table,
)


def printed(report: Report, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(console_table(report, width=width))
        return console.export_text()


def test_console_table_has_a_line_per_row() -> None:
    report = fake_report()
    assert console_table(report).row_count == len(report.rows)
    text = printed(report)
    for word in (
        "87.9 ± 0.6",
        "accuracy %",
        "1.2 M",
        "4.8 MB",
        "2.11× 2.05–2.19",
        "base",
        "batch 1, 2 threads",
    ):
        assert word in text
    fused = next(line for line in text.splitlines() if line.strip().startswith("fused"))
    assert fused.count("–") == len(CONDITIONS) + 1


def test_console_table_cuts_no_figure_on_a_narrow_terminal() -> None:
    text = printed(fake_report(), width=80)
    assert "…" not in text
    for word in ("vit-a", "4.3 M", "17.2 MB", "2.11×", "2.05–2.19", "28.6~"):
        assert word in text
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("width", [80, 100, 160])
def test_names_fold_at_hyphens_and_figures_are_whole(width: int) -> None:
    names = ("random-refit", "random-refit-of-another-family", "x" * 30)
    rows = (*fake_rows()[:2],
            *(dataclasses.replace(fake_rows()[3], name=n) for n in names))  # fmt: skip
    for report in (fake_report(rows=rows, speedups=()), quick_report()):
        lines = printed(report, width).splitlines()
        assert all(len(line.rstrip()) <= width for line in lines)
    lines = printed(fake_report(rows=rows, speedups=()), width).splitlines()
    assert any(line.startswith("random-refit ") for line in lines)
    if width == 80:
        assert {"of-another-", "family"} <= {line.strip() for line in lines}


def test_latencies_have_their_interval_where_it_is_known() -> None:
    report = quick_report()
    assert "6.74 ± 0.051" in printed(report)  # 11.83 · 0.57, −0.5 % to +1 %
    old = dataclasses.replace(report, rows=without_intervals(report.rows))
    assert "±" in printed(old) and "6.74 ±" not in printed(old)


def test_console_table_shows_markup_as_written() -> None:
    rows = (dataclasses.replace(fake_rows()[0], name="[red]a[/x]"), *fake_rows()[1:])
    assert "[red]a[/x]" in printed(fake_report(rows=rows, speedups=()))
