"""The Pareto front of a run, and what is shown beside it."""

from __future__ import annotations

import dataclasses

import pytest
from report.fakes import fake_report, fake_rows

from slimfuse.report import accuracy_latency
from slimfuse.report.pareto import front, of_the_shape, unbeaten
from slimfuse.report.scatter import Point, _reach, _within


def test_the_front_is_who_nobody_beats() -> None:
    points = [(3.0, 0.9, "slow"), (1.0, 0.7, "quick"), (2.0, 0.7, "beaten"), (2.0, 0.8, "middle")]
    assert unbeaten(points, "accuracy") == ["quick", "middle", "slow"]
    for time, value, name in points:  # by the definition, one by one
        beaten = any(t <= time and v >= value and (t, v) != (time, value) for t, v, _ in points)
        assert (name in unbeaten(points, "accuracy")) == (not beaten)
    assert unbeaten(points, "perplexity") == ["quick"]
    assert front(fake_rows(), 2, 1, "accuracy") == ["child-int8.onnx", "child.onnx", "vit-a"]


def test_only_baselines_of_the_childs_shape_borrow_its_latency() -> None:
    rows = list(fake_rows())
    rows[6] = dataclasses.replace(rows[6], latency=())
    [found] = of_the_shape(fake_report(rows=tuple(rows), speedups=()), 2, 1)
    assert found.name == "from scratch" and found.at(2, 1) == rows[4].at(2, 1)
    rows[6] = dataclasses.replace(rows[6], flops=1)
    assert of_the_shape(fake_report(rows=tuple(rows), speedups=()), 2, 1) == []


def test_a_baseline_far_off_stands_at_the_edge_and_says_its_value() -> None:
    rows = fake_rows()
    near = [Point(r, (87.0, 88.0, 89.0), (1.0, 1.0, 2.0), r.name) for r in rows[:2]]
    far = Point(rows[6], (20.0, 21.0, 22.0), (1.0, 1.0, 1.0), "far", timed=False)
    low, high = _reach([*near, far])
    assert 80 < low < 87 and 89 < high < 100
    shown = _within(far, "accuracy", low, high)
    assert shown.shown == (low, low, low) and shown.label == "far 86.2 ↓"
    assert _within(near[0], "accuracy", low, high) == near[0]


@pytest.mark.parametrize("narrow", [False, True])
def test_the_plot_holds_the_front_and_borrowed_rows(narrow: bool) -> None:
    rows, plain = fake_rows(), accuracy_latency(fake_rows()[:6], 2, 1, narrow=narrow)
    full = accuracy_latency(
        rows[:6], 2, 1, narrow=narrow, front=["vit-a", "child.onnx"], borrowed=rows[6:]
    )
    assert full.count("<path") > plain.count("<path")
