"""The report's table on a terminal."""

from __future__ import annotations

import dataclasses

from report.fakes import CONDITIONS, fake_report, fake_rows
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


def test_console_table_shows_markup_as_written() -> None:
    rows = (dataclasses.replace(fake_rows()[0], name="[red]a[/x]"), *fake_rows()[1:])
    assert "[red]a[/x]" in printed(fake_report(rows=rows, speedups=()))
