"""The first screen's facts: what went in, what came out, its quality, size and speed."""

from __future__ import annotations

from dataclasses import dataclass

from slimfuse.report import words
from slimfuse.report.rows import Report, Row
from slimfuse.report.verdict import best, child, headline, primary_metric, reference, speedup_of


@dataclass(frozen=True)
class Fact:
    """One fact: what it is about, the figure, and what to read it against."""

    term: str
    figure: str
    beside: str = ""


def facts(report: Report) -> tuple[Fact, ...]:
    """Return the facts of a run in the order they are read; what was not measured is left out."""
    row = child(report)
    if row is None:
        return ()
    found = (_came_in(report), _came_out(report, row), _quality(report, row), _size(report, row))
    return tuple(fact for fact in (*found, _speed(report)) if fact is not None)


def _came_in(report: Report) -> Fact | None:
    parents = [row for row in report.rows if row.stage == "parent"]
    if not parents:
        return None
    sizes = {row.params for row in parents}
    names = ", ".join(
        row.name if len(sizes) == 1 else f"{row.name} {words.count(row.params)}" for row in parents
    )
    each = f"{words.count(parents[0].params)} parameters" + " each" * (len(parents) > 1)
    many = f"{len(parents)} parent{'s' * (len(parents) > 1)}"
    return Fact("Went in", many, f"{names}; {each}" if len(sizes) == 1 else f"{names} parameters")


def _came_out(report: Report, row: Row) -> Fact:
    base, beside = reference(report), "parameters"
    if base is not None and base.params and row.params:
        many = base.params / row.params
        if 0.95 < many < 1.05:
            beside += f"; parent {base.name} has {words.count(base.params)}"
        else:
            kind = "fewer" if many > 1 else "more"
            beside += f"; {words.times(max(many, 1 / many))} {kind} than parent {base.name}"
    return Fact("Came out", words.count(row.params), beside)


def _quality(report: Report, row: Row) -> Fact | None:
    metric, base = primary_metric(report), reference(report)
    if metric is None or metric not in row.metrics:
        return None
    figure = row.metrics[metric]
    told = words.interval(metric, figure)
    if figure.n is not None:
        told += f"{', ' if told else ''}n = {words.whole(figure.n)}"
    if base is not None and metric in base.metrics:
        best_of = words.measured(metric, base.metrics[metric])
        told += f"{'; ' if told else ''}parent {base.name} has {best_of}"
    return Fact(metric.replace("_", " ").capitalize(), words.measured(metric, figure), told)


def _size(report: Report, row: Row) -> Fact:
    base, metric = reference(report), primary_metric(report)
    files = [(best([r for r in report.rows if r.stage == stage], metric), what)
             for stage, what in (("onnx", "ONNX"), ("onnx-int8", "INT8"))]  # fmt: skip
    beside = [f"{what} file {words.size(one.bytes)}" for one, what in files if one is not None]
    if base is not None:
        beside.append(f"parent {base.name}'s {words.size(base.bytes)}")
    return Fact("Size of the weights", words.size(row.bytes), "; ".join(beside))


def _speed(report: Report) -> Fact | None:
    at, base = headline(report), reference(report)
    timed = [row for row in report.rows if at is not None and row.at(*at) is not None]
    row = next((r for stage in ("onnx", "finetuned", "onnx-int8") for r in timed
                if r.stage == stage), None)  # fmt: skip
    if row is None or at is None:
        return None
    latency, beside = row.at(*at), words.condition(*at)
    assert latency is not None, "only rows that were timed"
    found = speedup_of(report, row, at)
    if found is not None and base is not None:
        than = " than" if found.low > 1 or found.high < 1 else " to"
        between = f"({found.low:.2f}–{found.high:.2f})"
        beside = f"{words.speed(found)}{than} parent {base.name} {between}; {beside}"
    between = words.p50_interval(latency)
    beside = f"p50{f', {between}' if between else ''}; {beside}"
    return Fact(f"Latency of {row.name}", f"{words.number(latency.p50_ms)} ms", beside)
