"""`slimfuse diagnose`: tables that decide something, of saved models or of a recipe's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimfuse.cli.output import AsJson, give, screen
from slimfuse.cli.recipes import Overrides
from slimfuse.progress import working


def diagnose(
    models: Annotated[
        list[str],
        typer.Argument(
            help="A recipe; or saved models, the parent first, its children behind it.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="A data source's name, or a folder with train and test.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="As in a recipe (default: by config.json).")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="As in a recipe (default: by config.json).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Held-out samples of each table.")] = 64,
    probes: Annotated[int, typer.Option(help="Random probes of each sample.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time of all tables together.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw and the probes.")] = 0,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A recipe's run folder (default runs/NAME).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how narrow a model can be, why its child works, if it is brittle, what INT8 costs."""
    with working("starting"):
        from slimfuse.pipeline import diagnose as examine
    from slimfuse.report import finding_table

    found = examine(
        *models, data=data, family=family, task=task, samples=samples, probes=probes,
        seconds=seconds, seed=seed, overrides=tuple(overrides or ()), out=out,
    )  # fmt: skip
    stdout = screen(as_json)
    for table in found.tables:
        stdout.print(finding_table(table))
        stdout.print()
    give(found.tables, as_json)
