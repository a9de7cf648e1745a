"""A sweep as one HTML page and as a table in the terminal."""

from __future__ import annotations

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from slimfuse.report import words
from slimfuse.report.html import page
from slimfuse.report.panels import Drawn, drawn
from slimfuse.report.rows import Row
from slimfuse.report.scatter import accuracy_latency, accuracy_size, level_bar
from slimfuse.report.sweep_rows import Candidate, SweepReport
from slimfuse.report.table import NARROW, WIDE, Cells, filled_table, plain_table


def render_sweep(report: SweepReport) -> str:
    """Return the sweep as one self-contained page; every text of the user is escaped."""
    metrics = [report.metric]
    return page(
        "sweep.html.j2",
        report=report,
        title=report.name,
        kind="sweep",
        measured_in="sweep",
        where=words.condition(report.threads, report.batch),
        metrics=metrics,
        base=next(row for row in report.parents if row.name == report.base),
        plots=_plots(report),
        ratios={(s.base, s.other): s for s in report.ratios},
        gated=any(candidate.gates for candidate in report.candidates),
        environment=sorted(report.environment.items()),
        timings=sorted(report.timings.items(), key=lambda item: (-item[1], item[0])),
        total=sum(report.timings.values()),
    )


def _plots(report: SweepReport) -> list[Drawn]:
    metric, points = report.metric, report.points
    front = [c.name for c in report.candidates if c.front]
    named = {*(row.name for row in report.parents), *(c.name for c in report.candidates)}
    unnamed = [row.name for row in points if row.name not in named]
    where = words.condition(report.threads, report.batch)
    better = "down" if words.lower_is_better(metric) else "up"
    bars = f"The upright bar is the 95 % interval of {metric}"
    tied = "The dashed line ties the candidates that no other one beats (the Pareto front)"
    small = "; small marks without a name are baselines, at the latency of their candidate's shape"

    by_time = [
        accuracy_latency(
            points, report.threads, report.batch, metric=metric, front=front, unnamed=unnamed,
            narrow=narrow,
        )
        for narrow in (False, True)
    ]  # fmt: skip
    by_size = [
        accuracy_size(points, metric=metric, front=front, unnamed=unnamed, narrow=narrow)
        for narrow in (False, True)
    ]
    return [
        drawn(
            f"{metric.capitalize()} against latency, {where}",
            f"{better.capitalize()} and to the left is better. {bars}, "
            f"{level_bar(points, report.threads, report.batch)}. {tied}{small if unnamed else ''}.",
            f"Scatter plot of {metric} against p50 latency at {where}: {_seen(report, 'time')}.",
            *by_time,
        ),
        drawn(
            f"{metric.capitalize()} against size",
            f"{better.capitalize()} and to the left is better. {bars}. {tied}.",
            f"Scatter plot of {metric} against parameters: {_seen(report, 'size')}.",
            *by_size,
        ),
    ]


def _seen(report: SweepReport, what: str) -> str:
    rows = [*((row.name, row) for row in report.parents)]
    rows += [(candidate.name, candidate.row) for candidate in report.candidates]
    return "; ".join(
        f"{name} {words.measured(report.metric, row.metrics[report.metric])} at "
        + (f"{_p50(report, row)} ms" if what == "time" else f"{words.count(row.params)} parameters")
        for name, row in rows
    )


def sweep_table(report: SweepReport, *, width: int | None = None) -> Table:
    """Return one line per candidate after the parents: quality, size, p50 latency, speed-up.

    width: see `console_table`.
    """
    narrow = width is not None and width < 100
    found = sweep_cells(report)
    table = plain_table(report.name, found.conditions, width)
    # these break at their blanks on a narrow terminal: no figure is cut
    breaking = {found.columns[1]: 10, "p50": 7, "speed-up": 9, "": 5}
    for name in found.columns:
        side: JustifyMethod = "left" if name in ("candidate", "gates", "") else "right"
        least = breaking.get(name)
        table.add_column(Text(name), justify=side, no_wrap=least is None, min_width=least)
    return filled_table(table, found, NARROW if narrow else WIDE)


def sweep_cells(report: SweepReport) -> Cells:
    """Return one line per candidate after the parents: quality, size, p50 latency, speed-up."""
    gated = any(candidate.gates for candidate in report.candidates)
    _, unit = words.scale(report.metric, report.candidates[0].row.metrics[report.metric])
    columns = ["candidate", f"{report.metric} {unit}".strip(), "params", "size", "p50", "speed-up"]
    rows = []
    for row in report.parents:
        told = "base" if row.name == report.base else "–"
        rows.append(_cells(report, row.name, row, told, *[""] * gated, "parent"))
    for one in report.candidates:
        speed = one.speedup
        told = f"{speed.ratio:.2f}× {speed.low:.2f}–{speed.high:.2f}" if speed else "–"
        gates = [("passed" if one.passed else "FAILED")] * gated
        rows.append(_cells(report, one.name, one.row, told, *gates, mark(report, one)))
    return Cells(
        [*columns, *["gates"] * gated, ""],
        rows,
        "± half of the 95 % interval · p50 in ms at "
        f"{words.condition(report.threads, report.batch)}, ONNX, all timed in turns\n"
        f"speed-up over {report.base}, with its 95 % interval · front: no other candidate is "
        "better",
    )


def mark(report: SweepReport, candidate: Candidate) -> str:
    """Return what a candidate is in a sweep, in a few words."""
    told = ["pick"] * (candidate.name == report.picked)
    told += ["nearest"] * (candidate.name == report.nearest)
    told += ["front"] * candidate.front
    return ", ".join(told)


def _cells(report: SweepReport, name: str, row: Row, *more: str) -> list[str]:
    quality = words.plus_minus(report.metric, row.metrics[report.metric])
    size = [words.count(row.params), words.size(row.bytes)]
    return [name, quality, *size, _p50(report, row), *more]


def _p50(report: SweepReport, row: Row) -> str:
    return words.p50(row.at(report.threads, report.batch))
