"""The one sentence a reader takes away, built from measured rows only."""

from __future__ import annotations

from slimfuse.report import words
from slimfuse.report.rows import Report, Row, Speedup

# a reader deploys the last child before export; earlier stages stand in where it is missing
_CHILD = ("sparse", "finetuned", "fused", "onnx", "onnx-int8")
# full precision first: what INT8 does is a clause of its own
_TIMED = ("onnx", "finetuned", "fused", "onnx-int8")


def primary_metric(report: Report) -> str | None:
    """Return the metric the report leads with: the task's, else the first by name."""
    order = words.metric_order(report.rows, report.metric)
    return order[0] if order else None


def best(rows: list[Row], metric: str | None) -> Row | None:
    """Return the row with the best `metric`; the first row where none has it."""
    if metric is None or not any(metric in row.metrics for row in rows):
        return rows[0] if rows else None
    sign = -1.0 if words.lower_is_better(metric) else 1.0
    return max(
        (row for row in rows if metric in row.metrics), key=lambda r: sign * r.metrics[metric].value
    )


def reference(report: Report) -> Row | None:
    """Return the best parent: what the child is compared with. None without parents."""
    return best([r for r in report.rows if r.stage == "parent"], primary_metric(report))


def child(report: Report) -> Row | None:
    """Return the row the verdict speaks of: the best of the last stage before export."""
    for stage in _CHILD:
        row = best([r for r in report.rows if r.stage == stage], primary_metric(report))
        if row is not None:
            return row
    return None


def headline(report: Report) -> tuple[int, int] | None:
    """Return the (threads, batch) the first screen speaks of: smallest batch, most threads."""
    compared = {(s.threads, s.batch) for s in report.speedups}
    choices = compared or set(report.conditions)
    return min(choices, key=lambda c: (c[1], -c[0]), default=None)


def speedup_of(report: Report, row: Row, at: tuple[int, int] | None) -> Speedup | None:
    """Return the row's speed-up over the reference under the conditions `at`, else None."""
    base = reference(report)
    if base is None:
        return None
    wanted = (base.name, row.name, at)
    found = (s for s in report.speedups if (s.base, s.other, (s.threads, s.batch)) == wanted)
    return next(found, None)


def verdict(report: Report) -> str:
    """Return the measured verdict, such as

    "child: 87.9 % (parents 88.4, 88.1) · 3.6× fewer parameters · 2.1× faster at batch 1, 2 threads
    · INT8 keeps 87.8 %". Where a figure is missing, its clause says so or is left out.
    """
    row, metric = child(report), primary_metric(report)
    if row is None:
        return "No child was measured in this run."
    clauses = [_quality(report, row, metric), _params(report, row), _zeros(report)]
    clauses += [_speed(report), _int8(report, row, metric)]
    return " · ".join(clause for clause in clauses if clause)


def _quality(report: Report, row: Row, metric: str | None) -> str:
    if metric is None or metric not in row.metrics:
        return f"{row.name}: quality not measured"
    figures = [(r, r.metrics[metric]) for r in report.rows if metric in r.metrics]
    parents = [words.bare(metric, f, f.value) for r, f in figures if r.stage == "parent"]
    text = f"{row.name}: {words.measured(metric, row.metrics[metric])}"
    if metric != "accuracy":  # a bare 12.4 says nothing; 87.9 % is read as accuracy
        text += f" {metric}"
    if parents:
        text += f" (parent{'s' if len(parents) > 1 else ''} {', '.join(parents)})"
    return text


def _than(report: Report, base: Row) -> str:
    parents = [r for r in report.rows if r.stage == "parent"]
    return "" if len({r.params for r in parents}) < 2 else f" than {base.name}"


def _params(report: Report, row: Row) -> str:
    base = reference(report)
    if base is None or row.params <= 0 or base.params <= 0:
        return ""
    ratio = base.params / row.params
    if 0.95 < ratio < 1.05:
        return "about as many parameters" + (" as " + base.name if _than(report, base) else "")
    many = f"{words.times(ratio)} fewer" if ratio > 1 else f"{words.times(1 / ratio)} more"
    return f"{many} parameters{_than(report, base)}"


def _zeros(report: Report) -> str:
    share = report.sparsity
    if share is None:
        return ""
    return f"{100 * share:.0f} % zeros in the layers that were pruned"


def _speed(report: Report) -> str:
    at, base = headline(report), reference(report)
    for stage in _TIMED:
        row = best([r for r in report.rows if r.stage == stage], primary_metric(report))
        found = speedup_of(report, row, at) if row else None
        if found is not None and base is not None:
            what = "INT8 " if stage == "onnx-int8" else ""
            than = _than(report, base) if found.low > 1 or found.high < 1 else ""
            where = words.condition(found.threads, found.batch)
            return f"{what}{words.speed(found)}{than} at {where}"
    return "speed not compared"


def _int8(report: Report, row: Row, metric: str | None) -> str:
    small = best([r for r in report.rows if r.stage == "onnx-int8"], metric)
    if small is None or small is row or metric is None:
        return ""
    if metric not in small.metrics or metric not in row.metrics:
        return ""
    now, then = small.metrics[metric], row.metrics[metric]
    lost = (then.value - now.value) * (-1 if words.lower_is_better(metric) else 1)
    # one per cent is the default of the recipe's `max_drop`
    verb = "keeps" if lost <= 0.01 * abs(then.value) else "falls to"
    if verb == "falls to" and words.lower_is_better(metric):
        verb = "rises to"
    return f"INT8 {verb} {words.measured(metric, now)}"
