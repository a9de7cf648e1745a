"""Reports as a notebook shows them: a compact fragment without style sheet, picture or script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimfuse.report.html import filled
from slimfuse.report.sweep_page import sweep_cells
from slimfuse.report.table import Cells, run_cells, runs_cells
from slimfuse.report.verdict import verdict

if TYPE_CHECKING:
    from slimfuse.report.compare import RunsReport
    from slimfuse.report.rows import GateResult, Report
    from slimfuse.report.sweep_rows import SweepReport


def fragment(report: Report, page: str = "") -> str:
    """Return a report as a fragment of HTML; page: where its whole page lies."""
    return tables_fragment(report.name, [verdict(report), report.summary], [run_cells(report)],
                           report.gates, report.warnings, page)  # fmt: skip


def runs_fragment(report: RunsReport) -> str:
    """Return several runs as a fragment of HTML."""
    from slimfuse.report.compare_page import cautions, lead

    told = [lead(report), *cautions(report)]
    return tables_fragment(f"{len(report.runs)} runs compared", told, [runs_cells(report)])


def sweep_fragment(report: SweepReport, page: str = "") -> str:
    """Return a sweep as a fragment of HTML; page: where its whole page lies."""
    picked = f"pick: {report.picked} · " if report.picked else ""
    told = [picked + report.reason, report.summary]
    cells = [sweep_cells(report)]
    return tables_fragment(report.name, told, cells, warnings=report.warnings, page=page)


def tables_fragment(
    title: str,
    sentences: Sequence[str],
    tables: Sequence[Cells],
    gates: Sequence[GateResult] = (),
    warnings: Sequence[str] = (),
    page: str = "",
) -> str:
    """Return tables with what is to be said of them as a fragment of HTML; texts are escaped."""
    return filled(
        "notebook.html.j2", title=title, sentences=[s for s in sentences if s], tables=tables,
        gates=gates, warnings=warnings, page=page,
    )  # fmt: skip
