"""`slimfuse reproduce`: a finished run made again from its lock, figure by figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from slimfuse.cli.output import AsJson, give, screen
from slimfuse.errors import Exit
from slimfuse.progress import working

if TYPE_CHECKING:
    from slimfuse.pipeline import Reproduction

MARKS = {True: "[green]yes[/]", False: "[red]NO[/]", None: "[dim]–[/]"}


def reproduce(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Where something is now: parents.0.from=PATH, data.path=PATH. May be repeated.",
            metavar="KEY=PATH",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The new run's folder (default RUN-reproduced).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a finished run again from its lock, and compare every figure with the report's."""
    with working("starting"):
        from slimfuse.pipeline import reproduce as make_again

    found = make_again(run, overrides=tuple(overrides or ()), out=out)
    show(found, screen(as_json))
    told = {
        "original": found.original, "folder": found.run.folder, "reproduced": found.reproduced,
        "exact": found.exact, "figures": found.figures, "conditions": found.conditions,
    }  # fmt: skip
    give(told, as_json)
    if not found.reproduced:
        raise typer.Exit(Exit.FAILED)


def show(found: Reproduction, stdout: Console) -> None:
    """Print every figure then and now, and what else differs."""
    from rich.table import Table

    table = Table(title=escape(f"{found.original} made again"))
    for column in ("what", "then", "now", "same"):
        table.add_column(column, justify="left" if column == "what" else "right", overflow="fold")
    for figure in found.figures:
        table.add_row(
            escape(figure.what), escape(figure.then), escape(figure.now), MARKS[figure.same]
        )
    stdout.print(table)
    for one in found.conditions:
        stdout.print(escape(f"differs: {one.what}: {one.then} then, {one.now} now"))
    if found.exact:
        told = "machine, threads and versions are the same: bytes and figures must be, too"
    else:
        told = "so each figure need only lie in the 95 % interval that it had"
    stdout.print(told)
    verdict = "it reproduces" if found.reproduced else "[red]it does not reproduce[/]"
    stdout.print(f"{verdict}; latencies are not judged")
    stdout.print(escape(f"report: {found.run.folder / 'report.html'}"), soft_wrap=True)
