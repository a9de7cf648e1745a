"""What a run measured, and how it is shown: JSON, one HTML page, a table in the terminal."""

from slimfuse.report.compare import RunsReport
from slimfuse.report.compare_page import render_runs
from slimfuse.report.figures import draw
from slimfuse.report.folders import compare_runs, load, redraw
from slimfuse.report.html import render_html
from slimfuse.report.notebook import fragment, sweep_fragment, tables_fragment
from slimfuse.report.rows import (
    STAGES,
    Example,
    Figure,
    FileSize,
    Finding,
    GateResult,
    Latency,
    LayerZeros,
    Picture,
    Report,
    Row,
    Speedup,
    Stage,
    Tried,
    from_json,
    to_json,
)
from slimfuse.report.scatter import accuracy_latency
from slimfuse.report.sweep_page import render_sweep, sweep_table
from slimfuse.report.sweep_rows import Candidate, Search, SweepReport, Trial
from slimfuse.report.table import Cells, console_table, finding_table, runs_table
from slimfuse.report.verdict import verdict

__all__ = [
    "STAGES",
    "Candidate",
    "Cells",
    "Example",
    "Figure",
    "FileSize",
    "Finding",
    "GateResult",
    "Latency",
    "LayerZeros",
    "Picture",
    "Report",
    "Row",
    "RunsReport",
    "Search",
    "Speedup",
    "Stage",
    "SweepReport",
    "Trial",
    "Tried",
    "accuracy_latency",
    "compare_runs",
    "console_table",
    "draw",
    "finding_table",
    "fragment",
    "from_json",
    "load",
    "redraw",
    "render_html",
    "render_runs",
    "render_sweep",
    "runs_table",
    "sweep_fragment",
    "sweep_table",
    "tables_fragment",
    "to_json",
    "verdict",
]
