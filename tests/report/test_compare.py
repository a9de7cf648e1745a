"""Runs side by side: what may be compared, what may not and why."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from report.fakes import fake_report, fake_rows, latencies
from report.test_page import Page

from slimfuse.report import Figure, Report, Speedup, render_runs, runs_table, to_json, words
from slimfuse.report.compare import SCHEMA, RunsReport, compare, lines
from slimfuse.report.compare_page import NOT_IN_TURNS, cautions, lead


def variant(name: str = "other", **changes: Any) -> Report:
    return fake_report(name=name, pictures=0, **changes)


def slower(factor: float) -> tuple[Any, ...]:
    return tuple(
        dataclasses.replace(row, latency=latencies(row.latency[0].p50_ms * factor))
        if row.latency
        else row
        for row in fake_rows()
    )


def both(second: Report) -> RunsReport:
    return compare({"runs/a": variant("first"), "runs/b": second})


def test_runs_alike_are_compared_in_everything() -> None:
    found = both(variant())
    assert (found.quality, found.latency, found.metric, found.at) == ("", "", "accuracy", (2, 1))
    assert cautions(found) == [] and found.settings == ()
    html = render_runs(found)
    assert NOT_IN_TURNS in Page(html).text
    assert html.count("<img") == 2  # against latency, and against size


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        ({"environment": {"cpu": "another"}}, "latency", "cpu: AMD EPYC 7B13, 2 cores / another"),
        ({"rows": slower(1.3)}, "latency", "the machine was not equally fast"),
        ({"rows": tuple(dataclasses.replace(r, latency=()) for r in fake_rows())},
         "latency", "other measured no latency"),
        ({"settings": {"recipe": {"task": "causal-lm"}}}, "latency", "different tasks or data"),
        ({"settings": {"sha256": {"data": "x"}}}, "quality", "different data"),
        ({"metric": "log_loss"}, "quality", "different metrics (accuracy, log_loss)"),
        ({"rows": tuple(
            dataclasses.replace(r, metrics={"accuracy": Figure(0.5, n=7)}) for r in fake_rows()
        )}, "quality", "n = 10000, n = 7"),
    ],
    ids=["machine", "drift", "untimed", "task", "data", "metric", "samples"],
)  # fmt: skip
def test_what_can_not_be_compared_is_said(changes: dict[str, Any], kind: str, why: str) -> None:
    if "rows" in changes:
        changes = {"speedups": (), **changes}
    found = both(variant(**changes))
    assert why in getattr(found, kind)
    assert any(why in caution for caution in cautions(found))
    assert (lead(found) == "") == bool(found.quality)


def test_figures_against_a_runs_own_parents_need_the_same_parents() -> None:
    settings = [
        {"recipe": {"task": "sentence-embedding"}, "sha256": {"parents": {"a": key}}}
        for key in "xxy"
    ]
    reports = [variant(f"r{i}", settings=one) for i, one in enumerate(settings)]
    assert compare({"a": reports[0], "b": reports[1]}).quality == ""
    assert "the parents differ" in compare({"a": reports[0], "b": reports[2]}).quality


def test_where_the_machine_drifted_the_plot_shows_shares_of_the_parents_time() -> None:
    speedups = tuple(
        Speedup("vit-a", name, 2, 1, ratio, ratio * 0.9, ratio * 1.1)
        for name, ratio in (("child.onnx", 2.0), ("child-int8.onnx", 2.5))
    )
    found = both(variant(rows=slower(1.5), speedups=speedups))
    assert [(row.name, s and round(s.ratio, 2)) for row, s in found.ratios] == [
        ("first", 2.11), ("first INT8", 3.02), ("other", 2.0), ("other INT8", 2.5),
        ("parent vit-a of first and 1 more", None),
    ]  # fmt: skip
    alts = [attrs["alt"] or "" for attrs in Page(render_runs(found)).all("img")]
    assert "other 87.9 % in 0.50 of the time" in alts[0]


def test_the_page_holds_every_run_and_is_accessible() -> None:
    settings = {"recipe": {"target": {"hidden_size": 64}, "gates": [{"metric": "accuracy"}]}}
    wide = {"recipe": {"target": {"hidden_size": 96}, "gates": [{"metric": "accuracy"}]}}
    found = compare({"runs/a": variant("narrow", settings=settings),
                     "runs/b": variant("wide", settings=wide)})  # fmt: skip
    html = render_runs(found)
    page, text = Page(html), Page(html).text
    assert [(s.key, s.values) for s in found.settings] == [("target.hidden_size", ("64", "96"))]
    for line in lines(found):
        assert line.run.name in text and line.run.folder in text
        assert words.interval("accuracy", line.row.metrics["accuracy"]) in text
    assert "−17.15" in text  # what fusing spent
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    regions = [a for _, a in page.tags if a.get("role") == "region"]
    assert regions and all(a.get("tabindex") == "0" for a in regions)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", html)


def test_names_tell_the_runs_apart_and_are_escaped() -> None:
    same = variant("<b>x</b>")
    found = compare({"runs/0/x": same, "runs/1/x": same})
    assert [run.name for run in found.runs] == ["0/x", "1/x"]
    assert "<b>x" not in render_runs(compare({"a": same, "b": variant("y", metric="log_loss")}))


def test_json_and_terminal_hold_the_same_figures() -> None:
    found = both(variant())
    data = json.loads(to_json(found, SCHEMA))
    assert data["schema"] == "slimfuse.runs/1"
    assert [run["name"] for run in data["runs"]] == ["first", "other"]
    assert data["runs"][0]["report"]["rows"][4]["metrics"]["accuracy"]["value"] == 0.8791
    assert data["runs"][0]["report"]["pictures"] == []
    assert runs_table(found).row_count == 2


def test_the_best_is_named_with_those_that_may_be_as_good() -> None:
    rows = tuple(
        dataclasses.replace(r, metrics={"accuracy": Figure(0.7, n=10_000, low=0.69, high=0.71)})
        for r in fake_rows()
    )
    assert lead(both(variant(rows=rows, speedups=()))) == "first has the best accuracy: 87.9 %"
    assert "interval of other overlaps" in lead(both(variant()))
