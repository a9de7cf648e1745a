"""What a run measured, and how it is shown: JSON, one HTML page, a table in the terminal."""

from slimfuse.report.figures import accuracy_latency, draw
from slimfuse.report.html import render_html
from slimfuse.report.rows import (
    STAGES,
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
from slimfuse.report.sweep_page import render_sweep, sweep_table
from slimfuse.report.sweep_rows import Candidate, Search, SweepReport, Trial
from slimfuse.report.table import console_table, finding_table
from slimfuse.report.verdict import verdict

__all__ = [
    "STAGES",
    "Candidate",
    "Figure",
    "FileSize",
    "Finding",
    "GateResult",
    "Latency",
    "LayerZeros",
    "Picture",
    "Report",
    "Row",
    "Search",
    "Speedup",
    "Stage",
    "SweepReport",
    "Trial",
    "Tried",
    "accuracy_latency",
    "console_table",
    "draw",
    "finding_table",
    "from_json",
    "render_html",
    "render_sweep",
    "sweep_table",
    "to_json",
    "verdict",
]
