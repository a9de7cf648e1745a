"""The command line: typer commands that call the library, nothing else."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from slimfuse.cli.diagnose import diagnose
from slimfuse.cli.output import EPILOG, AsJson, give, screen
from slimfuse.cli.recipes import Overrides, RecipePath, recipes
from slimfuse.cli.report import report
from slimfuse.cli.reproduce import reproduce
from slimfuse.errors import Exit, SlimfuseError, Terminated, UserError
from slimfuse.interrupt import terminate
from slimfuse.processes import Ended, ended_by_sigterm, main_speaks, spoken, take_leave
from slimfuse.progress import console, working

if TYPE_CHECKING:
    from slimfuse.pipeline import Run, Sweep

app = typer.Typer(
    name="slimfuse",
    help="Fuse trained transformers into one narrower standard model, measured and deployable.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=EPILOG,
)
app.add_typer(recipes, name="recipe")
app.command()(diagnose)
app.command()(report)
app.command()(reproduce)

Out = Annotated[Path | None, typer.Option("--out", help="The run folder (default runs/NAME).")]


@app.callback()
def options(
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of internal faults.")
    ] = False,
) -> None:
    """Options that hold for every command."""


@app.command()
def compress(
    recipe: RecipePath, overrides: Overrides = None, out: Out = None, as_json: AsJson = False
) -> None:
    """Run a recipe: parents in, one narrower model with its report out."""
    with working("starting"):  # torch takes seconds
        from slimfuse.pipeline import compress as run_recipe

    _show(run_recipe(recipe, overrides=tuple(overrides or ()), out=out), as_json)


@app.command()
def sparsify(
    recipe: RecipePath,
    parent: Annotated[
        str | None, typer.Option(help="Name of the parent to prune (default: the first).")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of zeros, 0 to 1 (default: the recipe's, or 0.8).")
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="What chooses them, as woodfisher or magnitude.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Which go together: unstructured, 2:4, 4x1.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the schedule.")] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The run folder (default runs/NAME-sparse).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prune one parent of a recipe at its own shape: zeros in, the same report and files out."""
    with working("starting"):
        from slimfuse.pipeline import sparsify as prune

    run = prune(
        recipe, parent=parent, sparsity=sparsity, scorer=scorer, pattern=pattern, steps=steps,
        overrides=tuple(overrides or ()), out=out,
    )  # fmt: skip
    _show(run, as_json)


def _show(run: Run, as_json: bool) -> None:
    """Print what a finished run found, and exit with 3 where a gate failed."""
    from slimfuse.report import console_table, to_json

    stdout = screen(as_json)
    stdout.print(console_table(run.report, width=stdout.width))
    for gate in run.report.gates:
        mark = "[green]held[/]" if gate.passed else "[red]FAILED[/]"
        stdout.print(f"{escape(f'gate {gate.metric}: {gate.rule}: {gate.measured}')}, {mark}")
    for warning in run.report.warnings:
        stdout.print(f"[yellow]note:[/] {escape(warning)}")
    places = f"model:  {run.model}\nreport: {run.folder / 'report.html'}"
    stdout.print(escape(places), soft_wrap=True)
    report = json.loads(to_json(run.report))
    told = {"folder": run.folder, "model": run.model, "passed": run.passed, "report": report}
    give(told, as_json)
    if not run.passed:
        raise typer.Exit(Exit.FAILED)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    outline: Annotated[
        bool,
        typer.Option(
            "--outline",
            help="Read only the parents' config.json: no weights, data or tokenizers are needed.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would make and need, before any work."""
    from rich.table import Table

    with working("starting"):
        from slimfuse.pipeline import plan as make_plan

    made = make_plan(recipe, overrides=tuple(overrides or ()), outline=outline)
    models, *shapes = made.tables
    stdout = screen(as_json)
    title = f"{'Outline' if outline else 'Plan'} of {recipe.name}"
    for cells in (models, *shapes):
        table = Table(title=escape(title if cells is models else cells.conditions))
        for place, column in enumerate(cells.columns):
            words_alone = place < 2 or (cells is not models and place == len(cells.columns) - 1)
            table.add_column(column, justify="left" if words_alone else "right")
        for row in cells.rows:
            table.add_row(*map(escape, row))
        stdout.print(table)
    for note in (*(made.proposal.notes if made.proposal is not None else ()), *made.notes):
        stdout.print(escape(note), soft_wrap=True)
    stdout.print(models.conditions)
    told = {
        "name": recipe.name, "models": made.models, "memory": made.memory, "disk": made.disk,
        "notes": made.notes,
        "shapes": [] if made.proposal is None else [list(row) for row in made.proposal.rows()],
    }  # fmt: skip
    give(told, as_json)


@app.command("compare")
def compare_methods(
    recipe: RecipePath,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 3,
    steps: Annotated[
        str | None,
        typer.Option(help="Finetuning budgets in steps, as in 0,300,1000.", show_default=False),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            help="An ablation instead: the recipe beside itself with one key changed, a row for "
            "every value. May be repeated; one key changes at a time.",
            metavar="KEY=V1,V2,…",
        ),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder (default runs/NAME-compare).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe's method beside all others and the controls, at equal budgets."""
    from rich.markdown import Markdown

    with working("starting"):
        from slimfuse.pipeline.comparison import compare, markdown

    found = compare(
        recipe, seeds=range(seeds), steps=_numbers(steps), overrides=tuple(overrides or ()),
        vary=tuple(vary or ()), out=out,
    )  # fmt: skip
    screen(as_json).print(Markdown(markdown(found)))
    give(asdict(found), as_json)


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(
            "not a list of steps", where="--steps", got=text, allowed="numbers, as in 0,300,1000"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


@app.command("sweep")
def sweep_recipe(
    recipe: RecipePath,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change one key. Of several values, as in target.hidden_size=0.75,0.5, each makes "
            "a candidate; of several such options every combination does.",
            metavar="KEY=V1,V2,…",
        ),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="Search a key between two numbers or among values, on held-out training samples. "
            "May be repeated.",
            metavar="KEY=LOW..HIGH",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=0, help="Trials of the search, per candidate.")] = 0,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Make the candidates on a Ray cluster: HOST:PORT, auto for the one of this "
            "machine, or local for this machine's processors.",
            metavar="ADDRESS",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder (default runs/NAME-sweep).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe at several settings: what they share made once, their trade-off in one page."""
    with working("starting"):
        from slimfuse.pipeline import sweep

    found = sweep(
        recipe, vary=tuple(options or ()), search=tuple(search or ()), trials=trials, ray=ray,
        out=out,
    )  # fmt: skip
    _show_sweep(found, as_json)


def _show_sweep(found: Sweep, as_json: bool) -> None:
    """Print what a sweep found, and exit with 3 where no candidate passes the gates."""
    from slimfuse.report import sweep_table, to_json
    from slimfuse.report.sweep_rows import SCHEMA

    stdout, report = screen(as_json), found.report
    stdout.print(sweep_table(report, width=stdout.width))
    told = f"pick: {report.picked}: {report.reason}" if report.picked else report.reason
    stdout.print(escape(told), style=None if found.passed else "red", soft_wrap=True)
    for warning in report.warnings:
        stdout.print(f"[yellow]note:[/] {escape(warning)}")
    if found.picked is not None:
        stdout.print(escape(f"model:  {found.picked.model}"), soft_wrap=True)
    stdout.print(escape(f"report: {found.folder / 'sweep.html'}"), soft_wrap=True)
    values = json.loads(to_json(report, SCHEMA))
    give({"folder": found.folder, "passed": found.passed, "report": values}, as_json)
    if not found.passed:
        raise typer.Exit(Exit.FAILED)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A finished model folder.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Prove that a model folder opens in stock classes, in a process without slimfuse."""
    from slimfuse.stock import verify as prove

    with working(escape(f"opening {folder} in a process of its own")):
        found = prove(folder)
    typer.echo(
        f"{folder}: {found.model_class}, {found.parameters:,} parameters, with "
        f"{found.processor_class}; same answers as in its run (within {found.gap:.1e} of their "
        "size)",
        err=as_json,
    )
    give({"folder": folder, **asdict(found)}, as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has and what will be slow or missing."""
    from slimfuse.doctor import examine

    stdout = screen(as_json)
    checks = []
    for check in examine():
        checks.append(check)
        mark = "[green]ok[/]  " if check.passed else "[red]bad[/] "
        stdout.print(f"{mark} {escape(f'{check.name}: {check.detail}')}", soft_wrap=True)
    ok = all(check.passed for check in checks)
    give({"passed": ok, "checks": checks}, as_json)
    if not ok:
        raise typer.Exit(Exit.FAILED)


def main() -> None:
    """Run the command line; every error ends in one message and an exit code, see `EXIT_CODES`.

    In several processes the message comes once, and the code from all.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        code, said = take_leave(*_ended(arguments, debug))
        if said:
            console.quiet = False
            console.print(said, soft_wrap=True)
            spoken()
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def _ended(arguments: list[str], debug: bool) -> tuple[int, str | None]:
    """Run a command and return its exit code and what is left to say, see `take_leave`."""
    try:
        with main_speaks():
            typer.main.get_command(app).main(arguments, prog_name="slimfuse")
        return 0, ""
    except SystemExit as done:  # typer's way to end, by an interruption too
        code = done.code if isinstance(done.code, int) else 0
        again = "interrupted: run the same command again to go on from here"
        return code, again if code == Exit.INTERRUPTED else ""
    except Terminated as ended:
        return ended.exit_code, ended_by_sigterm()
    except Ended as ended:
        return ended.exit_code, None
    except _expected() as error:
        _trace(debug)
        return int(error.exit_code), f"[bold red]error:[/] {escape(str(error))}"
    except Exception as error:
        _trace(debug)
        return Exit.FAULT, (
            f"[bold red]internal fault:[/] {escape(f'{type(error).__name__}: {error}')}\n"
            "  next:    run the same command with --debug and report what it prints"
        )


def _expected() -> tuple[type[Any], ...]:
    """Return the errors that are raised on purpose, the exporter's too where it was loaded."""
    exporter = sys.modules.get("slimfuse_export.errors")
    return (SlimfuseError,) if exporter is None else (SlimfuseError, exporter.ExportError)


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


if __name__ == "__main__":
    main()
