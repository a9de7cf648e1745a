"""The figures of two runs of one lock beside each other, and which of them must be the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slimfuse.report import Figure, Latency, Report, Row

MACHINE = ("cpu", "machine", "torch threads", "training precision")
"""What of a report's environment the last digits depend on, beside the versions."""


@dataclass(frozen=True)
class Compared:
    """One figure then and now, ready to read. same: None where it isn't judged, as a latency."""

    what: str
    then: str
    now: str
    same: bool | None


@dataclass(frozen=True)
class Differing:
    """A condition that isn't what it was: a version, the processor, its threads."""

    what: str
    then: str
    now: str


def differing(then: Report, now: Report) -> tuple[Differing, ...]:
    """Return every condition that differs and that the last digits may depend on."""
    found = []
    for what in MACHINE:
        found.append((what, then.environment.get(what), now.environment.get(what)))
    versions = [{"slimfuse": r.settings.get("slimfuse"), **_versions(r)} for r in (then, now)]
    for what in {**versions[0], **versions[1]}:
        found.append((what, versions[0].get(what), versions[1].get(what)))
    return tuple(
        Differing(what, str(before or "none"), str(after or "none"))
        for what, before, after in found
        if before != after
    )


def _versions(report: Report) -> dict[str, Any]:
    return dict(report.settings.get("versions") or {})


def compare_reports(then: Report, now: Report, *, exact: bool) -> tuple[Compared, ...]:
    """Return the figures of two reports beside each other, row by row.

    exact: whether machine, threads and versions are the same: the task's metrics must then be the
    same numbers, else each must lie in the other's 95 % interval from before. Parameters and FLOPs
    are always the same; latencies are never judged, nor is what a measured latency chose.
    """
    found = {row.name: row for row in now.rows}
    made: list[Compared] = []
    for row in then.rows:
        again = found.pop(row.name, None)
        if again is None:
            made.append(Compared(row.name, "a row", "none", False))
        else:
            made += _compare_rows(row, again, exact=exact and not _timed(row, then))
    made += [Compared(name, "none", "a row", False) for name in found]
    return tuple(made)


def _timed(row: Row, report: Report) -> bool:
    """Tell whether a measured latency may have chosen the row's graph: `export.optimize`."""
    export = dict(report.settings.get("recipe") or {}).get("export") or {}
    return row.stage.startswith("onnx") and bool(export.get("optimize"))


def _compare_rows(then: Row, now: Row, *, exact: bool) -> Iterator[Compared]:
    for key, before in then.metrics.items():
        after = now.metrics.get(key)
        what = f"{then.name}: {key}"
        if after is None:
            yield Compared(what, _shown(before), "none", False)
        else:
            yield Compared(what, _shown(before), _shown(after), _same(before, after, exact))
    for key in ("params", "flops"):
        numbers = getattr(then, key), getattr(now, key)
        if numbers[0] != numbers[1]:  # of a standard model: the shape is the lock's
            yield Compared(f"{then.name}: {key}", f"{numbers[0]:,}", f"{numbers[1]:,}", False)
    for timed in then.latency:
        again = now.at(timed.threads, timed.batch)
        where = f"batch {timed.batch}, {timed.threads} thread{'s' * (timed.threads > 1)}"
        told = _milliseconds(again) if again is not None else "none"
        yield Compared(f"{then.name}: p50 at {where}", _milliseconds(timed), told, None)


def _same(then: Figure, now: Figure, exact: bool) -> bool | None:
    if exact:
        return now.value == then.value
    if then.low is None or then.high is None:
        return None
    return then.low <= now.value <= then.high


def _shown(figure: Figure) -> str:
    interval = f" ({figure.low:.4g} – {figure.high:.4g})" if figure.low is not None else ""
    return f"{figure.value:.6g}{interval}"


def _milliseconds(latency: Latency) -> str:
    low, high = latency.reach
    return f"{latency.p50_ms:.3f} ms" + f" ({low:.3f} – {high:.3f})" * (low < high)
