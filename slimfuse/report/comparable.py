"""What of several runs can be compared, why the rest can't, and what differs in their settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slimfuse.report import words
from slimfuse.report.rows import Report
from slimfuse.report.verdict import reference

DRIFT = 1.1
"""How much parents of one shape may differ in time between runs that are compared."""
MACHINE = ("cpu", "machine", "cores_allowed", "cpu_quota", "os", "onnxruntime")
"""What of the environment a latency depends on."""
AGAINST_PARENTS = ("sentence-embedding", "feature-extraction")
"""Tasks without labels: their figures say how like the run's own parents a model is."""


@dataclass(frozen=True)
class Setting:
    """A setting that is not the same in all runs; values: one a run, as they are written."""

    key: str
    values: tuple[str, ...]


def quality(reports: list[Report], metrics: list[str]) -> str:
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


def latency(reports: list[Report], common: set[tuple[int, int]]) -> str:
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


def differing(settings: Iterable[Mapping[str, Any]]) -> Iterable[Setting]:
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
