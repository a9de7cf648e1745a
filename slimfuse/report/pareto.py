"""Which models of a run no other one beats, and what stands beside them in the plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slimfuse.report import words
from slimfuse.report.rows import Report, Row
from slimfuse.report.scatter import plottable


def front(rows: Sequence[Row], threads: int, batch: int, metric: str) -> list[str]:
    """Return the names of the rows that no other one beats (Pareto), the quickest first.

    One beats another that is in neither worse and in one better: the metric, and p50 latency. By
    the figures as they were measured, whatever their intervals.
    """
    found = plottable(rows, threads, batch, metric)
    return unbeaten([(x.p50_ms, figure.value, row.name) for row, figure, x in found], metric)


def unbeaten(points: Sequence[tuple[float, float, str]], metric: str) -> list[str]:
    """Return the names of the points (time, figure, name) that no other one beats, see `front`."""
    sign = -1.0 if words.lower_is_better(metric) else 1.0
    kept: list[tuple[float, float, str]] = []
    for time, value, name in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not kept or sign * value > sign * kept[-1][1]:
            kept.append((time, value, name))
    return [name for _, _, name in kept]


def of_the_shape(report: Report, threads: int, batch: int) -> list[Row]:
    """Return the baselines that were not timed, at the latency of the child, whose shape they have.

    A model's latency follows its shape: only a row with the child's parameters and FLOPs counts.
    """
    child = next((r for r in report.rows if r.stage == "onnx" and r.at(threads, batch)), None)
    if child is None:
        return []
    return [
        replace(row, latency=child.latency)
        for row in report.rows
        if row.stage == "baseline" and not row.latency
        and (row.params, row.flops) == (child.params, child.flops)
    ]  # fmt: skip
