"""Runs side by side as one HTML page, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slimfuse.report import words
from slimfuse.report.budget import ORDER
from slimfuse.report.compare import Compared, RunsReport, lines, merged
from slimfuse.report.html import page
from slimfuse.report.panels import Drawn, drawn, of_front
from slimfuse.report.pareto import front, unbeaten
from slimfuse.report.rows import Row
from slimfuse.report.scatter import (
    accuracy_latency,
    accuracy_ratio,
    accuracy_size,
    level_bar,
    plottable,
)
from slimfuse.report.verdict import verdict

NOT_IN_TURNS = (
    "Timed on machines of one description, but at different times and not in turns: only a "
    "speed-up within one run has an interval."
)


def render_runs(report: RunsReport) -> str:
    """Return the comparison as one self-contained page; every text of the user is escaped."""
    return page(
        "compare.html.j2",
        report=report,
        title=f"{len(report.runs)} runs compared",
        kind="comparison",
        measured_in="run, and read from its report.json",
        cautions=cautions(report),
        remark=NOT_IN_TURNS if not report.latency else "",
        lines=lines(report),
        lead=lead(report),
        verdicts=[(run, verdict(run.report)) for run in report.runs],
        plots=_plots(report),
        stages=_stages(report),
        environment=_environment(report),
    )


def cautions(report: RunsReport) -> list[str]:
    """Return what of the runs can't be compared, and why."""
    told = []
    if report.quality:
        told.append(f"Qualities can't be compared: {report.quality}.")
    if report.latency:
        told.append(
            f"Latencies can't be compared: {report.latency}. They are shown as each run measured "
            "them; speed-ups were timed in turns with the run's own parents."
        )
    return told


def lead(report: RunsReport) -> str:
    """Return the best run and whose interval overlaps its own, "" where none can be compared."""
    rows = [(one.run, one.row) for one in lines(report) if report.metric in one.row.metrics]
    if report.quality or len(rows) < 2:
        return ""
    sign = -1 if words.lower_is_better(report.metric) else 1
    run, row = max(rows, key=lambda one: sign * one[1].metrics[report.metric].value)
    figure = row.metrics[report.metric]
    within = [
        other.name for other, theirs in rows
        if other is not run and _overlap(row, theirs, report.metric)
    ]  # fmt: skip
    told = f"{run.name} has the best {report.metric}: {words.measured(report.metric, figure)}"
    if within:
        told += f"; the 95 % interval of {', '.join(within)} overlaps its own"
    return told


def _overlap(one: Row, two: Row, metric: str) -> bool:
    a, b = one.metrics[metric], two.metrics[metric]
    if None in (a.low, a.high, b.low, b.high):
        return False
    return bool(a.low <= b.high and b.low <= a.high)  # type: ignore[operator]


def _plots(report: RunsReport) -> list[Drawn]:
    metric = report.metric
    points = [row for row in report.points if metric in row.metrics]
    if report.quality or not metric or not points:
        return []
    better = "down" if words.lower_is_better(metric) else "up"
    bars = f"{better.capitalize()} and to the left is better; the upright bar is the 95 % interval"
    bars += f" of {metric}"
    out = []
    if not report.latency and report.at is not None and plottable(points, *report.at, metric):
        out.append(_by_time(report, points, report.at, bars))
    elif report.latency and report.at is not None and report.ratios:
        out.append(_by_ratio(report, report.at, bars))
    one_file = merged(row for row in points if row.stage != "onnx-int8")
    seen = "; ".join(
        f"{row.name} {words.measured(metric, row.metrics[metric])} with "
        f"{words.count(row.params)} parameters"
        for row in one_file
    )
    return [*out, _both_sizes(
        lambda narrow: accuracy_size(one_file, metric=metric, narrow=narrow),
        f"{metric.capitalize()} against size", f"{bars}.",
        f"Scatter plot of {metric} against parameters: {seen}.",
    )]  # fmt: skip


def _by_time(report: RunsReport, points: list[Row], at: tuple[int, int], bars: str) -> Drawn:
    metric, where = report.metric, words.condition(*at)
    tied = front(points, *at, metric)
    seen = "; ".join(
        f"{row.name} {words.measured(metric, shown)} at {words.p50(x)} ms"
        for row, shown, x in plottable(points, *at, metric)
    )
    return _both_sizes(
        lambda narrow: accuracy_latency(points, *at, metric=metric, front=tied, narrow=narrow),
        f"{metric.capitalize()} against latency, {where}",
        f"{bars}, {level_bar(points, *at)}. {of_front(tied)} {NOT_IN_TURNS}",
        f"Scatter plot of {metric} against p50 latency at {where}: {seen}. {of_front(tied)}",
    )


def _by_ratio(report: RunsReport, at: tuple[int, int], bars: str) -> Drawn:
    metric, where = report.metric, words.condition(*at)
    pairs = [(row, s) for row, s in report.ratios if metric in row.metrics]
    places = [(1 / s.ratio if s else 1.0, row.metrics[metric].value, row.name) for row, s in pairs]
    tied = unbeaten(places, metric)
    seen = "; ".join(
        f"{name} {words.measured(metric, row.metrics[metric])} in {share:.2f} of the time"
        for (share, _, name), (row, _) in zip(places, pairs, strict=True)
    )
    return _both_sizes(
        lambda narrow: accuracy_ratio(pairs, where, metric=metric, front=tied, narrow=narrow),
        f"{metric.capitalize()} against time, {where}",
        f"{bars}, the level one that of the time as a share of the run's own best parent's, timed "
        f"in turns: all parents have one shape. {of_front(tied)}",
        f"Scatter plot of {metric} against time at {where}, as a share of the parents': {seen}. "
        f"{of_front(tied)}",
    )


def _both_sizes(draw: Callable[[bool], str], title: str, caption: str, alt: str) -> Drawn:
    return drawn(title, caption, alt, draw(False), draw(True))


@dataclass(frozen=True)
class Spending:
    """A run's stages in a table: its best parent's figure, and by stage figure and change."""

    run: Compared
    parent: str
    cells: dict[str, tuple[str, str]]


def _stages(report: RunsReport) -> tuple[list[str], list[Spending]]:
    """Return every stage's name in order, and what the runs spent in each."""
    found = []
    for run in report.runs:
        spent = run.spent
        if spent is not None:
            cells: dict[str, tuple[str, str]] = {
                s.row.stage: (words.measured(spent.metric, s.figure), spent.signed(s.spent))
                for s in spent.steps
            }
            figure = words.measured(spent.metric, spent.start)
            found.append(Spending(run, f"{spent.parent.name}: {figure} {spent.metric}", cells))
    return [stage for stage in ORDER if any(stage in one.cells for one in found)], found


def _environment(report: RunsReport) -> list[tuple[str, list[str]]]:
    keys = sorted({key for run in report.runs for key in run.report.environment})
    return [(key, [run.report.environment.get(key, "–") for run in report.runs]) for key in keys]
