"""Tables for the terminal: a run's rows, several runs, and diagnostics."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from slimfuse.report import words
from slimfuse.report.compare import RunsReport, lines
from slimfuse.report.rows import Finding, Report, Row, Speedup
from slimfuse.report.verdict import headline, primary_metric, reference, speedup_of


@dataclass(frozen=True)
class Cells:
    """A table's texts: its columns, its rows, and the conditions of its figures."""

    columns: list[str]
    rows: list[list[str]]
    conditions: str


NARROW, WIDE = 14, 40
"""How long a name's lines may be on a terminal below 100 columns, and on others."""


def plain_table(title: str, conditions: str, width: int | None) -> Table:
    """Return a table without columns; below a width of 100 they stand closer."""
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left")
    table.pad_edge, table.show_edge, table.collapse_padding = False, False, True
    if width is not None and width < 100:
        table.padding = (0, 0)
    table.caption, table.caption_justify = Text(conditions), "left"
    return table


def filled_table(table: Table, found: Cells, limit: int) -> Table:
    """Return a table with rows whose names have lines of at most `limit` characters."""
    for name, *cells in found.rows:
        table.add_row(Text(words.folded(name, limit)), *map(Text, cells))
    return table


def console_table(report: Report, *, width: int | None = None) -> Table:
    """Return one line per row: quality, size, p50 latency, speed-up over the best parent.

    width: of the terminal; below 100 the columns stand closer. Where it is too small for all, the
    intervals of latencies go first, then the stages: four conditions fit in 80.

    Every cell is a `Text`: a name such as "[bold]" is shown, never read as markup.
    """
    narrow = width is not None and width < 100
    many = len(report.conditions)
    found = run_cells(report, bare=width is not None and width < 65 + 15 * many)
    if narrow and many > 2:
        found = _without(found, found.columns.index("stage"))
    table = plain_table(report.name, found.conditions, width)
    # these break at their blanks on a narrow terminal: no figure is cut
    breaking = {_heading(report, primary_metric(report)): 8, "speed-up": 9}
    for name in found.columns:
        side: JustifyMethod = "left" if name in ("model", "stage") else "right"
        least = breaking.get(name)
        table.add_column(Text(name), justify=side, no_wrap=least is None, min_width=least)
    return filled_table(table, found, NARROW if narrow else WIDE)


def _without(found: Cells, place: int) -> Cells:
    """Return a table without one column."""
    rows = [row[:place] + row[place + 1 :] for row in found.rows]
    return Cells(found.columns[:place] + found.columns[place + 1 :], rows, found.conditions)


def run_cells(report: Report, *, bare: bool = False) -> Cells:
    """Return one line per row of a run: its quality, size, p50 latencies and speed-up.

    bare: latencies without their intervals.
    """
    metric, base, at = primary_metric(report), reference(report), headline(report)
    timed = [f"p50\nb{batch} t{threads}" for threads, batch in report.conditions]
    columns = ["model", "stage", _heading(report, metric), "params", "size", *timed, "speed-up"]
    rows = []
    for row in report.rows:
        cells = [row.name, row.stage, _quality(row, metric)]
        cells += [words.count(row.params), words.size(row.bytes)]
        cells += [
            words.p50(row.at(threads, batch), bare=bare) for threads, batch in report.conditions
        ]
        rows.append([*cells, _speedup(report, row, base, at)])
    return Cells(columns, rows, _conditions(report))


def runs_table(report: RunsReport, *, width: int | None = None) -> Table:
    """Return one line per run: the deployed file's quality, size, p50 latency and speed-up.

    width: see `console_table`.
    """
    found = runs_cells(report)
    narrow = width is not None and width < 100
    table = plain_table(f"{len(report.runs)} runs", found.conditions, width)
    table.add_column(Text(found.columns[0]), no_wrap=True)
    for name in found.columns[1:]:
        table.add_column(Text(name), justify="right", min_width=9 if name == "speed-up" else None)
    return filled_table(table, found, NARROW if narrow else WIDE)


def runs_cells(report: RunsReport) -> Cells:
    """Return one line per run: the deployed file's quality, size, p50 latency and speed-up."""
    where = f" at {words.condition(*report.at)}" if report.at and not report.latency else ""
    rows = []
    for one in lines(report):
        row, speed = one.row, one.speedup
        cells = [one.run.name, _quality(row, one.metric), words.count(row.params)]
        cells += [words.size(row.bytes), words.p50(one.latency), _ratio(speed) if speed else "–"]
        rows.append([*cells, "–" if one.int8 is None else _quality(one.int8, one.metric)])
    return Cells(
        ["run", "quality", "params", "size", "p50", "speed-up", "INT8"],
        rows,
        f"± half of the 95 % interval · p50 in ms{where} · speed-up over a run's own best parent",
    )


def finding_table(finding: Finding) -> Table:
    """Return a table of diagnostics, its conditions above and what follows from it below."""
    table = Table(title=Text(f"{finding.title}\n{finding.conditions}"), box=box.SIMPLE_HEAD)
    table.title_justify, table.caption_justify = "left", "left"
    table.pad_edge, table.show_edge = False, False
    table.caption = Text(finding.decision)
    for place, name in enumerate(finding.columns):
        table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for row in finding.rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


def _heading(report: Report, metric: str | None) -> str:
    if metric is None:
        return "quality"
    figure = next(row.metrics[metric] for row in report.rows if metric in row.metrics)
    return f"{metric} {words.scale(metric, figure)[1]}".strip()


def _quality(row: Row, metric: str | None) -> str:
    if metric is None or metric not in row.metrics:
        return "not measured"
    return words.plus_minus(metric, row.metrics[metric])


def _ratio(speedup: Speedup) -> str:
    return f"{speedup.ratio:.2f}× {speedup.low:.2f}–{speedup.high:.2f}"


def _speedup(report: Report, row: Row, base: Row | None, at: tuple[int, int] | None) -> str:
    if row is base:
        return "base"
    found = speedup_of(report, row, at)
    return _ratio(found) if found is not None else "–"


def _conditions(report: Report) -> str:
    at, base = headline(report), reference(report)
    over = ""
    if at is not None and base is not None:
        over = f"\nspeed-up over {base.name} at {words.condition(*at)}, with its 95 % interval"
    noisy = any(x.noisy for row in report.rows for x in row.latency)
    return (
        "± half of the 95 % interval · p50 in ms (b batch, t threads"
        f"{', ~ noisy' if noisy else ''}) · – not measured{over}"
    )
