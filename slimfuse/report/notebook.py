"""Reports as a notebook shows them: a compact fragment without style sheet, picture or script."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimfuse.report.html import filled
from slimfuse.report.table import Cells, run_cells, runs_cells
from slimfuse.report.verdict import verdict

if TYPE_CHECKING:
    from slimfuse.report.compare import RunsReport
    from slimfuse.report.rows import GateResult, Report


def fragment(report: Report, page: str = "") -> str:
    """Return a report as a fragment of HTML; page: where its whole page lies."""
    return _fragment(report.name, [verdict(report), report.summary], run_cells(report),
                     report.gates, report.warnings, page)  # fmt: skip


def runs_fragment(report: RunsReport) -> str:
    """Return several runs as a fragment of HTML."""
    from slimfuse.report.compare_page import cautions, lead

    told = [lead(report), *cautions(report)]
    return _fragment(f"{len(report.runs)} runs compared", told, runs_cells(report))


def _fragment(
    title: str,
    sentences: list[str],
    cells: Cells,
    gates: tuple[GateResult, ...] = (),
    warnings: tuple[str, ...] = (),
    page: str = "",
) -> str:
    return filled(
        "notebook.html.j2", title=title, sentences=[s for s in sentences if s], cells=cells,
        gates=gates, warnings=warnings, page=page,
    )  # fmt: skip
