"""What every verb shares: `--json`, completion of recipes, exit codes for `--help`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from slimfuse.errors import EXIT_CODES

AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as one JSON document; what people read goes to stderr."
    ),
]
EPILOG = "Exit codes: " + ", ".join(f"{code.value} {told}" for code, told in EXIT_CODES.items())


def screen(as_json: bool) -> Console:
    """Return where people read: stdout, or stderr where that is kept for JSON."""
    return Console(stderr=as_json, highlight=False)


def give(result: Any, as_json: bool) -> None:
    """Print a result as one JSON document on stdout, where it is asked for."""
    if as_json:
        text = json.dumps(result, ensure_ascii=False, indent=1, default=_plain, allow_nan=False)
        sys.stdout.buffer.write(f"{text}\n".encode())  # UTF-8, whatever the terminal speaks
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    """Return what json doesn't know: a path as text, a record as a mapping."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def recipe_paths(incomplete: str) -> Iterator[str]:
    """Yield the recipes and folders whose path begins so, for the shell."""
    given = Path(incomplete)
    home = given if incomplete.endswith("/") or not incomplete else given.parent
    try:
        found = sorted(home.iterdir())
    except OSError:
        return
    for path in found:
        shown = path.as_posix()
        if not shown.startswith(incomplete.removeprefix("./")) or path.name.startswith("."):
            continue
        if path.is_dir():
            yield f"{shown}/"
        elif path.suffix in (".yaml", ".yml"):
            yield shown
