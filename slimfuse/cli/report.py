"""`slimfuse report`: a finished run's page drawn again, or several runs compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from slimfuse.cli.output import AsJson, give, screen
from slimfuse.progress import working

COMPARISON = Path("comparison.html")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="The folder of a finished run or sweep, or its report.json; several runs are "
            "compared.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The page (default: report.html in the run's folder; of several comparison.html "
            "here).",
        ),
    ] = None,
    examples: Annotated[
        bool,
        typer.Option(
            "--examples/--no-examples",
            help="Whether a run's page may show samples of its test set.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Draw the page of a finished run again from its figures, or compare several runs."""
    from slimfuse.report import (
        Report,
        compare_runs,
        console_table,
        load,
        redraw,
        render_runs,
        runs_table,
        sweep_table,
        to_json,
    )
    from slimfuse.report.compare import SCHEMA as RUNS
    from slimfuse.report.compare_page import cautions, lead
    from slimfuse.report.rows import SCHEMA
    from slimfuse.report.sweep_rows import SCHEMA as SWEEP
    from slimfuse.store import write_text

    shown = screen(as_json)
    if len(runs) == 1:
        found = load(runs[0])
        with working("drawing the report"):
            page = redraw(runs[0], out, examples=examples)
        figures = to_json(found, SCHEMA if isinstance(found, Report) else SWEEP)
        if isinstance(found, Report):
            shown.print(console_table(found, width=shown.width))
        else:
            shown.print(sweep_table(found, width=shown.width))
    else:
        together = compare_runs(runs)
        page = out or COMPARISON
        with working("drawing the comparison"):
            html = render_runs(together)
        write_text(page, html)
        figures = to_json(together, RUNS)
        shown.print(runs_table(together, width=shown.width))
        for told in filter(None, (lead(together), *cautions(together))):
            shown.print(escape(told), soft_wrap=True)
    shown.print(escape(f"report: {page}"), soft_wrap=True)
    give(json.loads(figures), as_json)
