"""The command line; each module of this folder adds its verbs to `app`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

import slimfuse_export
from slimfuse_export.cli import making, proving, timing, using
from slimfuse_export.errors import EXIT_CODES, Exit, ExportError

app = typer.Typer(
    name="slimfuse-export",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Check, time, quantise, use and serve a finished model folder, without torch.",
    epilog="Exit codes: " + ", ".join(f"{code.value} {told}" for code, told in EXIT_CODES.items()),
)
for room in (proving, making, timing, using):
    room.add(app)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit, see `slimfuse_export.errors.Exit`."""
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words  # wherever it stands
    words = [word for word in words if word != "--debug"]
    try:
        # the command itself: calling `app` would install typer's own excepthook
        typer.main.get_command(app)(args=words, prog_name="slimfuse-export")
    except ExportError as error:
        if debug:
            raise
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"internal fault: {text}; run with --debug for the traceback", file=sys.stderr)
        sys.exit(Exit.FAULT)
    sys.exit(Exit.DONE)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # see main
) -> None:
    if version:
        print(slimfuse_export.__version__)
        raise typer.Exit
