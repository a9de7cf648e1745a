"""The last thing a run prints: its rows as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from slimfuse.report import words
from slimfuse.report.rows import Finding, Report, Row
from slimfuse.report.verdict import headline, primary_metric, reference, speedup_of


def console_table(report: Report, *, width: int | None = None) -> Table:
    """Return one line per row: quality, size, p50 latency, speed-up over the best parent.

    width: of the terminal; below 100 the columns stand closer, so that four conditions fit in 80.

    Every cell is a `Text`: a name such as "[bold]" is shown, never read as markup.
    """
    metric, base, at = primary_metric(report), reference(report), headline(report)
    table = Table(title=Text(report.name), box=box.SIMPLE_HEAD, title_justify="left")
    table.pad_edge, table.show_edge = False, False
    table.collapse_padding = True
    if width is not None and width < 100:
        table.padding = (0, 0)
    table.caption = Text(_conditions(report))
    table.caption_justify = "left"
    table.add_column(Text("model"), overflow="fold", min_width=8)
    table.add_column(Text("stage"), no_wrap=True)
    # this and the last break at their blanks on a narrow terminal: no figure is cut
    table.add_column(Text(_heading(report, metric)), justify="right", min_width=10)
    for name in ("params", "size"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for threads, batch in report.conditions:
        table.add_column(Text(f"p50\nb{batch} t{threads}"), justify="right", no_wrap=True)
    table.add_column(Text("speed-up"), justify="right", min_width=9)
    for row in report.rows:
        cells = [row.name, row.stage, _quality(row, metric)]
        cells += [words.count(row.params), words.size(row.bytes)]
        cells += [_p50(row, threads, batch) for threads, batch in report.conditions]
        cells.append(_speedup(report, row, base, at))
        table.add_row(*[Text(cell) for cell in cells])
    return table


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


def _p50(row: Row, threads: int, batch: int) -> str:
    latency = row.at(threads, batch)
    if latency is None:
        return "–"
    return words.number(latency.p50_ms) + ("~" if latency.noisy else "")


def _speedup(report: Report, row: Row, base: Row | None, at: tuple[int, int] | None) -> str:
    if row is base:
        return "base"
    found = speedup_of(report, row, at)
    if found is None:
        return "–"
    return f"{found.ratio:.2f}× {found.low:.2f}–{found.high:.2f}"


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
