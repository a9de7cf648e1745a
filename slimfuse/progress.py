"""Progress of long work: a bar with the time left on a terminal, log lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)
LINE_SECONDS = 15.0


class Tracker(Protocol):
    """What long work tells as it goes."""

    def __call__(self, done: int, note: str = "") -> None:
        """Say that `done` units are finished in all, with a short note (loss, rate)."""


@contextmanager
def track(what: str, total: int) -> Iterator[Tracker]:
    """Show `what` and how far it is; yields a function that takes the units done so far."""
    yield from _bar(what, total) if console.is_terminal else _lines(what, total)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that `what` goes on where it can't be known how far it is."""
    if console.is_terminal:
        # bound to the stream of now: the work may turn sys.stderr away to silence a library
        with Console(file=console.file, highlight=False).status(what):
            yield
    else:
        console.print(f"  {what}")
        yield


def _bar(what: str, total: int) -> Iterator[Tracker]:
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(what, total=total, note="")

        def tell(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield tell


def _lines(what: str, total: int) -> Iterator[Tracker]:
    start = told = time.monotonic()
    first: int | None = None

    def tell(done: int, note: str = "") -> None:
        nonlocal told, first, start
        now = time.monotonic()
        if first is None:
            # resumed work, or what says nothing before its first part: the rate is of the rest
            first, start = done, now
        if now - told >= LINE_SECONDS:
            told = now
            parts = [f"  {what}: {done}/{total}"]
            if done > first:  # else nothing tells how fast it is
                left = (now - start) / (done - first) * (total - done)
                parts.append(f"about {left:.0f} s left")
            console.print(f"{', '.join(parts)} {note}".rstrip())

    yield tell
