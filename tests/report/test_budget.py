"""What each stage spent: the parts are the whole, and the sentence says so."""

from __future__ import annotations

import dataclasses
import re

import pytest
from report.fakes import fake_report, fake_rows

from slimfuse.report import Figure, Report, render_html
from slimfuse.report._canvas import darkened
from slimfuse.report.budget import Budget, budget, told
from slimfuse.report.waterfall import waterfall


def with_values(*values: float, metric: str = "perplexity") -> Report:
    rows = zip(fake_rows(), values, strict=False)
    return fake_report(
        rows=tuple(dataclasses.replace(row, metrics={metric: Figure(v)}) for row, v in rows),
        speedups=(),
    )


def budget_of(report: Report) -> Budget:
    found = budget(report)
    assert found is not None
    return found


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_the_parts_sum_to_the_whole_drop(metric: str) -> None:
    values = (0.91, 0.86, 0.71, 0.88, 0.885, 0.83)
    found = budget_of(with_values(*values, metric=metric))
    best = max(values[:2]) if metric == "accuracy" else min(values[:2])
    drop = best - values[-1] if metric == "accuracy" else values[-1] - best
    # sums of five numbers below one, in float64
    assert sum(step.spent for step in found.steps) == pytest.approx(drop, abs=1e-12)
    assert found.total == pytest.approx(drop, abs=1e-12)
    assert found.parent.name == ("vit-a" if metric == "accuracy" else "vit-b")
    assert [step.row.stage for step in found.steps] == ["fused", "finetuned", "onnx", "onnx-int8"]


def test_the_sentence_names_every_stage_and_who_lost() -> None:
    assert told(budget_of(fake_report())) == (
        "From parent vit-a's 88.4 % to 87.8 % in child-int8.onnx, 0.59 points worse in all: fusing "
        "spent 17.15 points, finetuning won 16.64 points, the ONNX export changed nothing, INT8 "
        "spent 0.08 points."
    )
    text = told(budget_of(with_values(20.0, 21.0, 90.0, 19.5)))
    assert "0.500 better in all: fusing spent 70.0, finetuning won 70.5" in text


def test_a_stage_that_is_missing_is_bridged_not_invented() -> None:
    rows = [row for row in fake_rows() if row.stage in ("parent", "fused", "onnx")]
    found = budget_of(fake_report(rows=tuple(rows), speedups=()))
    assert [step.row.stage for step in found.steps] == ["fused", "onnx"]
    assert found.total == pytest.approx(0.8842 - 0.8791, abs=1e-12)


def test_without_parent_or_child_there_is_no_budget_and_no_picture() -> None:
    for keep in ("parent", "fused"):
        rows = tuple(row for row in fake_rows() if row.stage == keep)
        report = fake_report(rows=rows[:2], speedups=(), pictures=())
        assert budget(report) is None
    assert "What each stage spent" not in render_html(report)  # nothing was timed: none is drawn


@pytest.mark.parametrize("values", [(88.0, 87.0, 3.0, 88.0, 88.0, 88.0), (20.0, 21.0, 4e4, 22.0)])
def test_the_picture_shows_every_change(values: tuple[float, ...]) -> None:
    found = budget_of(with_values(*values))
    for narrow in (False, True):
        svg = waterfall(found, narrow=narrow)
        assert svg.startswith("<svg") and len(svg) < 100_000
    assert {found.signed(step.spent)[0] for step in found.steps} <= {"+", "−", "±"}
    assert found.signed(found.steps[0].spent).startswith("−" if values[2] < 20 else "+")


def test_the_dark_theme_is_the_light_one_recoloured() -> None:
    found = budget_of(fake_report())
    ids = re.compile(r"(?<=#)[a-z][0-9a-f]{10}|(?<=id=\")[a-z][0-9a-f]{10}")  # hashes of content
    light, dark = (ids.sub("", waterfall(found, theme)) for theme in ("light", "dark"))
    assert light != dark and ids.sub("", darkened(light)) == dark
