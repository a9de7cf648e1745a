"""Finished runs as they lie on disk: their figures are read, and their page is drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimfuse.errors import UserError
from slimfuse.report.compare import RunsReport, compare
from slimfuse.report.html import render_html
from slimfuse.report.rows import SCHEMA, Report, from_json
from slimfuse.report.sweep_page import render_sweep
from slimfuse.report.sweep_rows import SCHEMA as SWEEP_SCHEMA
from slimfuse.report.sweep_rows import SweepReport, sweep_from_json
from slimfuse.store import write_text

MOST_BYTES = 64_000_000
"""A report is below a megabyte: what is larger than this is something else."""


@dataclass(frozen=True)
class _Kind:
    """What a folder may hold: its figures, its page, and how each is made."""

    figures: str
    page: str
    schema: str
    read: Callable[[str], Any]
    render: Callable[[Any], str]


_KINDS = (
    _Kind("report.json", "report.html", SCHEMA, from_json, render_html),
    _Kind("sweep.json", "sweep.html", SWEEP_SCHEMA, sweep_from_json, render_sweep),
)


def load(path: str | Path) -> Report | SweepReport:
    """Return what a finished run or sweep measured.

    path: its folder, or its report.json or sweep.json.

    Raises: UserError where there is none, or it is damaged or of another version.
    """
    found: Report | SweepReport = _read(*_found(Path(path)))
    return found


def redraw(path: str | Path, out: str | Path | None = None, *, examples: bool = True) -> Path:
    """Draw the page of a finished run or sweep again, from its figures alone; return the page.

    out: the file to write (default report.html or sweep.html beside the figures). examples: whether
    the page may show samples of the test set; report.json keeps them. Raises as `load`, and
    StorageError where the page can't be written.
    """
    file, kind = _found(Path(path))
    target = Path(out) if out is not None else file.with_name(kind.page)
    found = _read(file, kind)
    if not examples and isinstance(found, Report):
        found = replace(found, examples=(), chosen="")
    write_text(target, kind.render(found))
    return target


def compare_runs(paths: Sequence[str | Path]) -> RunsReport:
    """Return finished runs side by side, as far as their figures can be compared.

    Raises: UserError as `load`, for a sweep (it compares its candidates itself), and for a run that
    is named twice.
    """
    places = [_found(Path(path)) for path in paths]
    for file, kind in places:
        if kind.schema != SCHEMA:
            raise UserError(
                "a sweep compares its own candidates: only runs can be compared",
                where=str(file),
                hint="name the run folders below its candidates folder",
            )
    files = [file.resolve() for file, _ in places]
    twice = [str(p) for p, f in zip(paths, files, strict=True) if files.count(f) > 1]
    if twice:
        raise UserError("a run is named twice", got=", ".join(twice))
    return compare({str(p): _read(*place) for p, place in zip(paths, places, strict=True)})


def _found(path: Path) -> tuple[Path, _Kind]:
    """Return the file of a run's figures, and what it is."""
    for kind in _KINDS:
        file = path if path.name == kind.figures else path / kind.figures
        if file.is_file():
            return file, kind
    raise UserError(
        "there is no finished run here" if path.exists() else "there is no such folder",
        where=str(path),
        got="no report.json or sweep.json",
        allowed="the folder of a finished run or sweep",
        hint="`slimfuse compress RECIPE` makes one; a run that was stopped goes on when it is "
        "called again",
    )


def _read(file: Path, kind: _Kind) -> Any:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError("this is too large for a report", allowed=f"{MOST_BYTES:,} bytes")
        return kind.read(file.read_text(encoding="utf-8"))
    except UserError as error:
        error.where = f"{file}: {error.where}" if error.where else str(file)
        raise
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise UserError("this can't be read", where=str(file), got=told) from error
