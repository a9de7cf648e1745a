"""From the runs of a sweep to its report: the front, the pick, and what to know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slimfuse.pipeline.candidates import FOLDER, Candidate
from slimfuse.pipeline.choosing import Option, choose, front
from slimfuse.pipeline.making import Made
from slimfuse.pipeline.planning import Plan
from slimfuse.pipeline.sweep_timing import Timed
from slimfuse.recipe import Recipe
from slimfuse.report import Candidate as Shown
from slimfuse.report import Report, Row, Search, SweepReport, words
from slimfuse.report.sweep_rows import DEPLOYED
from slimfuse.report.verdict import headline, reference, speedup_of
from slimfuse.store import Store

ON_TEST = (
    "the front and the pick were decided on the test set: of many candidates the best ones look a "
    "little better there than they are"
)


def make_sweep_report(
    entries: Mapping[str, tuple[Candidate, Plan]],
    made: Mapping[str, Made],
    reports: Mapping[str, Report],
    timed: Timed,
    store: Store,
    *,
    command: str,
    path: Path,
    failed: Sequence[str] = (),
    searches: Sequence[Search] = (),
) -> SweepReport:
    """Return the report of a sweep, whose candidates stand in the same order in all mappings."""
    first = next(iter(reports.values()))
    job = next(iter(made.values())).found.job
    metric, at = job.task.metric, headline(first)
    assert at is not None, "latencies were measured"
    ratios = timed.between(made, *at)
    slow = {(s.other, s.base) for s in ratios if s.high < 1}

    def slower(a: str, b: str) -> bool:
        return (a, b) in slow

    options, told = [], {}
    for name, report in reports.items():
        row = _deployed(report)
        figure, timing = row.metrics[metric.key], row.at(*at)
        assert timing is not None, "latencies were measured"
        sign = 1 if metric.better == "higher" else -1
        told[name] = words.measured(metric.key, figure)
        recipe = made[name].found.job.recipe
        budgeted = isinstance(recipe, Recipe) and recipe.target.budget is not None
        options.append(
            Option(name, sign * figure.value, row.params, timing.p50_ms, report.gates, budgeted)
        )
    best, on_front = choose(options, slower, told), front(options, slower)
    shown = [
        Shown(
            name, f"{FOLDER}/{entries[name][0].folder}", entries[name][0].overrides,
            entries[name][1].models[-1].shape,
            tuple(row for row in report.rows if row.stage != "parent"), report.gates,
            speedup_of(report, _deployed(report), at), name in on_front,
        )
        for name, report in reports.items()
    ]  # fmt: skip
    base = reference(first)
    assert base is not None, "a run has parents"
    return SweepReport(
        name=job.recipe.name,
        recipe_path=first.recipe_path,
        command=command,
        summary=f"{len(shown)} candidates of {first.summary.partition(', ')[0]}",
        metric=metric.key,
        threads=at[0],
        batch=at[1],
        parents=_parents(made, reports),
        base=base.name,
        candidates=tuple(shown),
        picked=best.name,
        reason=best.reason,
        nearest=best.nearest,
        ratios=tuple(ratios),
        searches=tuple(searches),
        warnings=_warnings(reports, failed, metric.key, made, searches),
        environment=first.environment,
        timings=_timings([store, *(one.store for one in made.values())]),
    )


def _deployed(report: Report) -> Row:
    return next(row for row in report.rows if row.name == DEPLOYED)


def _parents(made: Mapping[str, Made], reports: Mapping[str, Report]) -> tuple[Row, ...]:
    """Return every parent once; those that differ between candidates keep the first one's row."""
    found: dict[str, Row] = {}
    for report in reports.values():
        for row in report.rows:
            if row.stage == "parent":
                found.setdefault(row.name, row)
    return tuple(found.values())


def _timings(stores: Sequence[Store]) -> dict[str, float]:
    """Return seconds by stage, of all stages with one name together; shared ones count once."""
    spent: dict[str, float] = {}
    for stage in {stage.key: stage for one in stores for stage in one.used}.values():
        spent[stage.name] = round(spent.get(stage.name, 0.0) + stage.seconds, 3)
    return spent


def _warnings(
    reports: Mapping[str, Report],
    failed: Sequence[str],
    metric: str,
    made: Mapping[str, Made],
    searches: Sequence[Search],
) -> tuple[str, ...]:
    out = [*failed]
    parents = {
        tuple((r.name, r.params, r.metrics[metric].value) for r in report.rows
              if r.stage == "parent")
        for report in reports.values()
    }  # fmt: skip
    if len(parents) > 1:
        out.append("the parents differ between candidates: the first one's are shown here")
    noisy = {
        name
        for name, report in reports.items()
        if any(x.noisy for row in report.rows for x in row.latency)
    }
    if noisy:
        out.append("the machine was busy while timing: measure again where latencies decide")
    saved = {p.name for one in made.values() for p in one.found.job.parents if p.train is None}
    if searches and saved:
        out.append(
            f"the search was measured on training samples that {', '.join(sorted(saved))} may have "
            "been trained on: its figures look better than the test set's"
        )
    if len(reports) > 1:
        out.append(ON_TEST)
    return tuple(out)
