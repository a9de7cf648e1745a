"""Finished runs side by side: what of them can be compared, and why the rest can't."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from slimfuse.report import words
from slimfuse.report.budget import Budget, budget
from slimfuse.report.rows import Latency, Report, Row, Speedup
from slimfuse.report.sweep_rows import named
from slimfuse.report.verdict import best, child, headline, primary_metric, reference, speedup_of

SCHEMA = "slimfuse.runs/1"
"""Raised by one whenever a key changes its meaning or goes away."""

DRIFT = 1.1
"""How much parents of one shape may differ in time between runs that are compared."""
MACHINE = ("cpu", "machine", "cores_allowed", "cpu_quota", "os", "onnxruntime")
"""What of the environment a latency depends on."""
AGAINST_PARENTS = ("sentence-embedding", "feature-extraction")
"""Tasks without labels: their figures say how like the run's own parents a model is."""


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
class Setting:
    """A setting that is not the same in all runs; values: one a run, as they are written."""

    key: str
    values: tuple[str, ...]


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
        Compared(label, folder, replace(report, pictures=(), settings={}, findings=(), zeros=()))
        for (folder, report), label in zip(reports.items(), labels, strict=True)
    )
    every = list(reports.values())
    metrics = list(dict.fromkeys(primary_metric(report) or "" for report in every))
    metric = metrics[0] if len(metrics) == 1 else ""
    common = set.intersection(*(set(report.conditions) for report in every))
    return RunsReport(
        runs,
        metric,
        _quality(every, metrics),
        _latency(every, common),
        tuple(sorted(common, key=lambda c: (c[1], c[0]))),
        tuple(_differing([report.settings for report in every])),
    )


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


def _quality(reports: list[Report], metrics: list[str]) -> str:
    """Return why qualities can't be compared, "" where they can."""
    if len(metrics) > 1 or not metrics[0]:
        told = ", ".join(metric or "none" for metric in metrics)
        return f"the runs lead with different metrics ({told})"
    tests = {(_at(r.settings, "sha256", "data"), _samples(r, metrics[0])) for r in reports}
    if len(tests) > 1:
        counts = dict.fromkeys(_samples(report, metrics[0]) for report in reports)
        told = f" ({', '.join(f'n = {n}' for n in counts)})" if len(counts) > 1 else ""
        return f"the runs were measured on different data{told}"
    parents = {str(_at(report.settings, "sha256", "parents")) for report in reports}
    tasks = {_at(report.settings, "recipe", "task") for report in reports}
    if tasks & set(AGAINST_PARENTS) and len(parents) > 1:
        return f"{metrics[0]} says how like its own parents a model is, and the parents differ"
    return ""


def _samples(report: Report, metric: str) -> int | None:
    return next((r.metrics[metric].n for r in report.rows if metric in r.metrics), None)


def _work(report: Report) -> tuple[str, str]:
    """Return what a run's models are given: what a call takes depends on it."""
    task, data = (_at(report.settings, *k) for k in (("recipe", "task"), ("sha256", "data")))
    return str(task), str(data)


def _latency(reports: list[Report], common: set[tuple[int, int]]) -> str:
    """Return why latencies can't be compared, "" where they can."""
    untimed = [report.name for report in reports if not report.conditions]
    if untimed:
        return f"{', '.join(untimed)} measured no latency"
    told = []
    for key in MACHINE:
        values = dict.fromkeys(report.environment.get(key, "unknown") for report in reports)
        if len(values) > 1:
            told.append(f"{key.replace('_', ' ')}: {' / '.join(values)}")
    if told:
        return f"the runs were timed on different machines or software ({'; '.join(told)})"
    if len({_work(report) for report in reports}) > 1:
        return "the runs answer samples of different tasks or data"
    if not common:
        each = ("; ".join(words.condition(*c) for c in report.conditions) for report in reports)
        return f"no batch and number of threads is common to the runs ({' / '.join(each)})"
    return _drift(reports, common)


def _drift(reports: list[Report], common: set[tuple[int, int]]) -> str:
    """Return that parents of one shape were not equally fast, "" where they were or none are."""
    bases = [base for base in map(reference, reports) if base is not None]
    if len(bases) < len(reports) or len({(base.params, base.flops) for base in bases}) > 1:
        return ""
    for at in sorted(common, key=lambda c: (c[1], -c[0])):
        p50 = [found.p50_ms for base in bases if (found := base.at(*at)) is not None]
        if len(p50) == len(bases) and max(p50) > DRIFT * min(p50):
            return (
                f"parents of one shape took {words.number(min(p50))} ms in one run and "
                f"{words.number(max(p50))} ms in another at {words.condition(*at)}, so the machine "
                "was not equally fast"
            )
    return ""


def _differing(settings: Iterable[Mapping[str, Any]]) -> Iterable[Setting]:
    """Yield the recipes' keys, versions and threads whose values differ, in natural order."""
    flat = []
    for one in settings:
        kept = {k: one[k] for k in ("slimfuse", "recipe", "resolved", "versions") if k in one}
        flat.append(dict(_flat(kept)))
    for key in sorted({key for one in flat for key in one}, key=words.natural):
        values = tuple(one.get(key, "–") for one in flat)
        if len(set(values)) > 1:
            yield Setting(key.removeprefix("recipe."), values)


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for place, inner in enumerate(value):
            named_by = inner.get("name", place) if isinstance(inner, Mapping) else place
            yield from _flat(inner, f"{key}.{named_by}")
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield key, {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _at(settings: Mapping[str, Any], *keys: str) -> Any:
    """Return a setting by its path, None where there is none."""
    found: Any = settings
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


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
