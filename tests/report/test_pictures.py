"""The report's pictures: small, the same bytes every time, and honest about averages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from report.fakes import fake_pictures, fake_rows, latencies

from slimfuse.errors import SlimfuseError
from slimfuse.report import (
    Picture,
    accuracy_latency,
    draw,
    figures,
)
from slimfuse.report._labels import overlap, place


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_kind_draws_one_small_svg(theme: str) -> None:
    for picture in fake_pictures(4):
        svg = draw(picture, theme)  # type: ignore[arg-type]
        assert svg.startswith("<svg") and svg.endswith("</svg>")
        assert "<metadata" not in svg and len(svg) < 100_000


def test_same_data_give_the_same_bytes() -> None:
    for picture in fake_pictures(4)[::2]:
        assert draw(picture) == draw(picture)


def test_block_means_keep_the_sum_of_each_block() -> None:
    matrix = np.arange(7 * 5, dtype=float).reshape(7, 5)
    small = figures.block_means(matrix, 3)
    assert small.shape == (3, 3)
    assert small[0, 0] == matrix[:3, :2].mean()
    assert small[2, 2] == matrix[6, 4]  # the short block at the corner
    assert figures.block_means(matrix, 7) is matrix


def test_downsampling_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(figures, "_aside", lambda _, text, __: said.append(text))
    ones = np.ones((600, 20))
    draw(Picture("t", "c", "a", "heatmap", {"matrix": ones, "xlabel": "x", "ylabel": "y"}))
    long = {"x": np.arange(5000), "y": np.ones(5000)}
    draw(Picture("t", "c", "a", "lines", {"series": {"s": long}, "xlabel": "x", "ylabel": "y"}))
    assert said == ["each cell: mean of a 3 × 1 block", "each point: mean of up to 10"]


@pytest.mark.parametrize(
    ("kind", "data", "gap"),
    [
        ("heatmap", {"matrix": [[1, 2], [3]], "xlabel": "x", "ylabel": "y"}, "2-D"),
        ("heatmap", {"matrix": [1, 2], "xlabel": "x", "ylabel": "y"}, "2-D"),
        (
            "lines",
            {"series": {"a": {"x": [1], "y": [1, 2]}}, "xlabel": "x", "ylabel": "y"},
            "1 x, 2 y",
        ),
        ("bars", {"labels": ["a"], "values": [1, 2], "ylabel": "y"}, "1 labels, 2 values"),
        ("bars", {"labels": []}, "'ylabel' is missing"),
        ("pie", {}, "pie"),
    ],
)
def test_picture_data_must_fit_their_kind(kind: str, data: dict, gap: str) -> None:
    with pytest.raises(SlimfuseError) as error:
        Picture("t", "c", "a", kind, data)  # type: ignore[arg-type]
    assert gap in str(error.value)


def test_plot_needs_a_point() -> None:
    with pytest.raises(SlimfuseError, match="no row has both"):
        accuracy_latency(fake_rows()[2:4], 1, 1)


def test_awkward_data_draw_without_a_warning() -> None:
    flat = {"matrix": np.zeros((3, 5)), "xlabel": "x" * 300, "ylabel": "模型"}
    draw(Picture("t", "c", "a", "heatmap", flat))
    series = {f"{'层' * 60}{i}": {"x": [1], "y": [i]} for i in range(9)}
    draw(Picture("t", "c", "a", "lines", {"series": series, "xlabel": "x", "ylabel": "y"}))
    for count in (1, 60):
        names = [f"{'encoder.' * 20}{i}" for i in range(count)]
        draw(
            Picture("t", "c", "a", "bars", {"labels": names, "values": [0] * count, "ylabel": "y"})
        )
    rows = [
        dataclasses.replace(r, name=f"{'long name ' * 9}{i}", latency=latencies(1.7 * 30**i))
        for i, r in enumerate(fake_rows()[:3])
    ]
    accuracy_latency(rows, 1, 1)  # spans decades: the axis turns logarithmic


@pytest.mark.parametrize("seed", range(20))
def test_a_label_is_nearest_to_its_own_point(seed: int) -> None:
    dx, dy = np.random.default_rng(seed).uniform(4, 12, size=2)
    points = [(200.0, 200.0), (200.0 - dx, 200.0 + dy)]
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    bars = [(x - 1, y - 40, x + 1, y + 40) for x, y in points]
    bars += [(x, y - 1, x + 120, y + 1) for x, y in points]
    boxes = [p.box for p in place(points, [(40.0, 9.0)] * 2, marks + bars, (180, 0, 400, 400))]

    def gap(box: tuple[float, ...], point: tuple[float, float]) -> float:
        x, y = point
        return float(np.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3])))

    for own, other, box in zip(points, points[::-1], boxes, strict=True):
        assert gap(box, own) < gap(box, other)


def test_labels_do_not_overlap() -> None:
    rng = np.random.default_rng(5)
    points = [(float(x), float(y)) for x, y in rng.uniform(60, 340, size=(23, 2))]
    points[1] = points[0]  # two rows with the same figures
    sizes = [(float(w), 9.0) for w in rng.uniform(20, 60, size=23)]
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    boxes = [p.box for p in place(points, sizes, marks, (0, 0, 400, 400))]
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[1] >= 0 and a[2] <= 400 and a[3] <= 400
        assert not any(overlap(a, b) for b in boxes[:i] + marks)
