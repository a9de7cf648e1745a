"""Finished runs side by side, as records with a JSON form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath

from slimfuse.report.budget import Budget, budget
from slimfuse.report.comparable import Setting, differing, latency, quality
from slimfuse.report.rows import Latency, Report, Row, Speedup
from slimfuse.report.sweep_rows import named
from slimfuse.report.verdict import best, child, headline, primary_metric, reference, speedup_of

SCHEMA = "slimfuse.runs/1"
"""Raised by one whenever a key changes its meaning or goes away."""


@dataclass(frozen=True)
class Compared:
    """One run: its name here, where it lies, and what it measured but for pictures and settings."""

    name: str
    folder: str
    report: Report

    @property
    def child(self) -> Row | None:
        """What is deployed: the ONNX file, else the last child before it."""
        rows = [row for row in self.report.rows if row.stage == "onnx"]
        return best(rows, primary_metric(self.report)) or child(self.report)

    @property
    def int8(self) -> Row | None:
        """The 8-bit file, None without one."""
        rows = [row for row in self.report.rows if row.stage == "onnx-int8"]
        return best(rows, primary_metric(self.report))

    @property
    def spent(self) -> Budget | None:
        """What its stages spent."""
        return budget(self.report)


@dataclass(frozen=True)
class RunsReport:
    """Several runs. metric: that all lead with, "" where they differ.

    quality, latency: why figures can't be compared, "" where they can; conditions: (threads, batch)
    that all runs were timed under; settings: those that differ.
    """

    runs: tuple[Compared, ...]
    metric: str
    quality: str
    latency: str
    conditions: tuple[tuple[int, int], ...]
    settings: tuple[Setting, ...]

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the runs side by side, compact and self-contained."""
        from slimfuse.report.notebook import runs_fragment

        return runs_fragment(self)

    @property
    def at(self) -> tuple[int, int] | None:
        """The conditions that a plot shows: smallest batch, most threads; None without any."""
        return min(self.conditions, key=lambda c: (c[1], -c[0]), default=None)

    @property
    def points(self) -> tuple[Row, ...]:
        """What a plot shows: each run's files by its name, and its best parent."""
        found: list[Row] = []
        for run in self.runs:
            for row in (run.child, run.int8):
                if row is not None:
                    found.append(named(row, run.name + " INT8" * (row.stage == "onnx-int8")))
            parent = reference(run.report)
            if parent is not None:
                found.append(named(parent, f"parent {parent.name} of {run.name}"))
        return tuple(found)

    @property
    def ratios(self) -> list[tuple[Row, Speedup | None]]:
        """The files with their speed-ups over parents of one shape, which stand once, without any.

        Nothing where not all runs have them at `at`.
        """
        bases = [reference(run.report) for run in self.runs]
        shapes = {(base.params, base.flops) for base in bases if base is not None}
        if len(shapes) != 1 or None in bases or self.at is None:
            return []
        found: list[tuple[Row, Speedup | None]] = []
        for run in self.runs:
            for row in (run.child, run.int8):
                speedup = speedup_of(run.report, row, self.at) if row is not None else None
                if row is not None and speedup is not None:
                    label = run.name + " INT8" * (row.stage == "onnx-int8")
                    found.append((named(row, label), speedup))
                elif row is run.child:
                    return []
        return found + [
            (row, None) for row in merged(p for p in self.points if p.stage == "parent")
        ]


def merged(rows: Iterable[Row]) -> list[Row]:
    """Return rows of which those with the same parameters and figures stand once, by all names."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        values = sorted((key, figure.value) for key, figure in row.metrics.items())
        alike.setdefault(f"{row.params} {values}", []).append(row)
    return [
        named(
            same[0], same[0].name if len(same) == 1 else f"{same[0].name} and {len(same) - 1} more"
        )
        for same in alike.values()
    ]


def compare(reports: Mapping[str, Report]) -> RunsReport:
    """Return runs side by side, by the folders they lie in; each shown under a name of its own."""
    labels = _labels(reports)
    runs = tuple(
        Compared(label, folder, _bare(report))
        for (folder, report), label in zip(reports.items(), labels, strict=True)
    )
    every = list(reports.values())
    metrics = list(dict.fromkeys(primary_metric(report) or "" for report in every))
    metric = metrics[0] if len(metrics) == 1 else ""
    common = set.intersection(*(set(report.conditions) for report in every))
    return RunsReport(
        runs,
        metric,
        quality(every, metrics),
        latency(every, common),
        tuple(sorted(common, key=lambda c: (c[1], c[0]))),
        tuple(differing([report.settings for report in every])),
    )


def _bare(report: Report) -> Report:
    """Return a report without what a comparison doesn't show."""
    return replace(report, settings={}, pictures=(), findings=(), zeros=(), examples=(),
                   chosen="")  # fmt: skip


def _labels(reports: Mapping[str, Report]) -> list[str]:
    """Return the reports' names where they differ, else the folders' last names that do."""
    names = [report.name for report in reports.values()]
    if len(set(names)) == len(names):
        return names
    parts = [PurePath(folder).parts for folder in reports]
    for depth in range(1, max(map(len, parts)) + 1):
        tails = ["/".join(part[-depth:]) for part in parts]
        if len(set(tails)) == len(tails):
            return tails
    return list(reports)


@dataclass(frozen=True)
class Line:
    """A run as a table shows it: what is deployed, its base, and under which conditions it ran."""

    run: Compared
    row: Row
    metric: str | None
    base: Row | None
    int8: Row | None
    latency: Latency | None
    speedup: Speedup | None


def lines(report: RunsReport) -> list[Line]:
    """Return the runs that have a child; latencies at the common conditions, else at their own."""
    found = []
    for run in report.runs:
        row = run.child
        if row is not None:
            at = headline(run.report) if report.latency or report.at is None else report.at
            found.append(
                Line(
                    run, row, primary_metric(run.report), reference(run.report), run.int8,
                    row.at(*at) if at is not None else None, speedup_of(run.report, row, at),
                )
            )  # fmt: skip
    return found
