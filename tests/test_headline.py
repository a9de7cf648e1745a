"""A report leads with its task's metric, whatever else is measured."""

from __future__ import annotations

import json

from slimfuse.report import Figure, Report, Row, from_json, render_html, to_json
from slimfuse.report.table import console_table
from slimfuse.report.verdict import primary_metric, reference, verdict
from slimfuse.tasks import TASKS


def report(metric: str) -> Report:
    def row(name: str, stage: str, overlap: float, accuracy: float) -> Row:
        figures = {"neighbour_overlap": Figure(overlap), "accuracy": Figure(accuracy)}
        return Row(name, stage, figures, 10, 10, 10)  # type: ignore[arg-type]

    rows = (row("a", "parent", 0.5, 0.9), row("b", "parent", 0.6, 0.8),
            row("c", "finetuned", 0.4, 0.7))  # fmt: skip
    return Report("x", "r.yaml", "slimfuse compress r.yaml", "", rows, metric=metric)


def test_the_tasks_metric_leads_before_and_after_it_was_written() -> None:
    for made in (report("neighbour_overlap"), from_json(to_json(report("neighbour_overlap")))):
        assert primary_metric(made) == "neighbour_overlap"
        base = reference(made)
        assert base is not None and base.name == "b"
        assert verdict(made).startswith("c: 40.0 % neighbour_overlap (parents 50.0, 60.0)")
        page = render_html(made)
        assert page.index('class="num">neighbour_overlap') < page.index('class="num">accuracy')
        assert "neighbour_overlap" in str(console_table(made).columns[2].header)
    assert primary_metric(report("accuracy")) == "accuracy"


def test_a_report_without_one_leads_with_the_first_by_name() -> None:
    written = json.loads(to_json(report("")))
    del written["metric"]  # as versions before wrote it
    assert primary_metric(from_json(json.dumps(written))) == "accuracy"


def test_every_tasks_metric_is_the_first_of_its_figures() -> None:
    assert all(task.metric is task.metrics[0] for task in TASKS.values())
