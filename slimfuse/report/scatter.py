"""Quality against latency or size: one mark a model, with its intervals and its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from slimfuse.errors import SlimfuseError
from slimfuse.report import words
from slimfuse.report._canvas import Palette, Theme, canvas, to_svg
from slimfuse.report._labels import Box, place
from slimfuse.report.rows import STAGES, Figure, Latency, Row, Speedup

# hue and mark per stage: the mark alone tells them apart in print
_MARKS = {
    "parent": (6, "s"),
    "fused": (4, "^"),
    "finetuned": (0, "o"),
    "sparse": (5, "P"),
    "onnx": (2, "D"),
    "onnx-int8": (3, "v"),
    "baseline": (1, "X"),
}


@dataclass(frozen=True)
class Point:
    """A row in a plot: its figure and its place in x, each (low, value, high) as it is shown.

    label: what stands beside it, "" for nothing. timed: whether it was timed itself; else it is a
    hollow mark where a row of its shape was timed. tail: how far a thin bar goes on in x.
    """

    row: Row
    shown: tuple[float, float, float]
    x: tuple[float, float, float]
    label: str
    timed: bool = True
    tail: float = 0.0

    @property
    def right(self) -> float:
        """Where its level bar ends."""
        return max(self.x[2], self.tail)


def accuracy_latency(
    rows: Sequence[Row],
    threads: int,
    batch: int,
    *,
    metric: str = "accuracy",
    theme: Theme = "light",
    front: Sequence[str] = (),
    unnamed: Sequence[str] = (),
    borrowed: Sequence[Row] = (),
    narrow: bool = False,
) -> str:
    """Return the plot of `metric` against p50 latency with both intervals, every row named.

    front: rows that a line ties, from left to right; unnamed: rows without a name beside them;
    borrowed: further rows, hollow, whose latency is that of a row of their shape; narrow: for a
    phone's screen.

    Raises: SlimfuseError when no row has both figures; ask `plottable` first.
    """
    points = [
        Point(row, _scaled(metric, shown), (x.reach[0], x.p50_ms, x.reach[1]),
              "" if row.name in unnamed else row.name, timed, x.p90_ms)
        for timed, some in ((True, rows), (False, borrowed))
        for row, shown, x in plottable(some, threads, batch, metric)
    ]  # fmt: skip
    label = f"latency p50, ms ({words.condition(threads, batch)})"
    return _scatter(points, label, metric, theme, front, narrow)


def accuracy_size(
    rows: Sequence[Row],
    *,
    metric: str,
    theme: Theme = "light",
    front: Sequence[str] = (),
    unnamed: Sequence[str] = (),
    narrow: bool = False,
) -> str:
    """Return the plot of `metric` with its interval against the number of parameters.

    front, unnamed, narrow: see `accuracy_latency`.

    Raises: SlimfuseError when no row has the metric.
    """
    most = max((row.params for row in rows), default=0)
    step, prefix = (1e6, "millions") if most >= 1e6 else (1e3, "thousands")
    points = [
        Point(row, _scaled(metric, row.metrics[metric]), (row.params / step,) * 3,
              "" if row.name in unnamed else row.name)
        for row in rows
        if metric in row.metrics
    ]  # fmt: skip
    return _scatter(points, f"parameters, {prefix}", metric, theme, front, narrow)


def accuracy_ratio(
    pairs: Sequence[tuple[Row, Speedup | None]],
    at: str,
    *,
    metric: str,
    theme: Theme = "light",
    front: Sequence[str] = (),
    narrow: bool = False,
) -> str:
    """Return the plot of `metric` against a model's time as a share of its base's, both intervals.

    pairs: rows that have the metric, with their speed-up; of a base None. at: the conditions;
    front, narrow: see `accuracy_latency`.
    """
    points = [
        Point(row, _scaled(metric, row.metrics[metric]),
              (1 / s.high, 1 / s.ratio, 1 / s.low) if s is not None else (1.0, 1.0, 1.0), row.name)
        for row, s in pairs
    ]  # fmt: skip
    return _scatter(points, f"time, share of its parent's ({at})", metric, theme, front, narrow)


def plottable(
    rows: Sequence[Row], threads: int, batch: int, metric: str
) -> list[tuple[Row, Figure, Latency]]:
    """Return the rows that have both the metric and a latency under these conditions."""
    found = ((row, row.metrics.get(metric), row.at(threads, batch)) for row in rows)
    return [(row, shown, latency) for row, shown, latency in found if shown and latency]


def level_bar(rows: Sequence[Row], threads: int, batch: int) -> str:
    """Return what the level bars of `accuracy_latency` are, in a clause."""
    latencies = [row.at(threads, batch) for row in rows]
    if any(x is not None and x.p50_low_ms is not None for x in latencies):
        return (
            "the level one that of the p50 latency, which a mark may hide, drawn on thinly to the "
            "p90"
        )
    return "the level one runs from the p50 to the p90 latency"


def _scatter(
    points: Sequence[Point],
    label: str,
    metric: str,
    theme: Theme,
    front: Sequence[str],
    narrow: bool,
) -> str:
    if not any(point.timed for point in points):
        raise SlimfuseError(f"no row has both {metric} and what it is drawn against", where=label)
    with canvas(*((3.5, 3.6) if narrow else (5.6, 3.5)), theme) as (figure, ax, colours):
        tied = sorted((p.x[1], p.shown[1]) for p in points if p.row.name in front)
        if len(tied) > 1:
            x, y = zip(*tied, strict=True)
            ax.plot(x, y, color=colours.muted, lw=1, ls=(0, (4, 2)), zorder=1)
        low, high = _reach(points)
        points = [_within(point, metric, low, high) for point in points]
        for point in points:
            _point(ax, point, colours)
        _, unit = words.scale(metric, points[0].row.metrics[metric])
        ax.set_xlabel(label)
        ax.set_ylabel(f"{metric}, {unit}" if unit else metric)
        ax.margins(0.14, 0.16)
        spread = [point.x[1] for point in points]
        if max(spread) > 4 * min(spread) > 0:
            _log_ticks(ax, min(spread), max(point.right for point in points))
        _stage_legend(figure, [point.row for point in points], colours, narrow)
        _name_points(figure, ax, points, colours)
        return to_svg(figure)


def _scaled(metric: str, shown: Figure) -> tuple[float, float, float]:
    factor, _ = words.scale(metric, shown)
    low = shown.value if shown.low is None else min(shown.low, shown.value)
    high = shown.value if shown.high is None else max(shown.high, shown.value)
    return low * factor, shown.value * factor, high * factor


def _reach(points: Sequence[Point]) -> tuple[float, float]:
    """Return how low and how high the plot reaches: a baseline far off would flatten the rest."""
    low = min(p.shown[0] for p in points if p.timed)
    high = max(p.shown[2] for p in points if p.timed)
    room = 0.6 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _within(point: Point, metric: str, low: float, high: float) -> Point:
    """Return a point; one that is out of reach stands at the edge and says its value."""
    bottom, value, top = point.shown
    if point.timed or low <= value <= high:
        return replace(point, shown=(max(bottom, low), value, min(top, high)))
    edge, arrow = (low, "↓") if value < low else (high, "↑")
    told = words.bare(metric, point.row.metrics[metric], point.row.metrics[metric].value)
    return replace(point, shown=(edge,) * 3, label=f"{point.label} {told} {arrow}".strip())


def _point(ax: Axes, point: Point, colours: Palette) -> None:
    hue, mark = _MARKS[point.row.stage]
    colour = colours.hues[hue]
    low, value, high = point.shown
    x = point.x[1]
    if point.label:
        if point.timed:
            ax.plot([x, point.right], [value, value], color=colour, lw=1, alpha=0.55)
            ax.plot(point.x[::2], [value, value], color=colour, lw=1.6, solid_capstyle="butt")
        ax.plot([x, x], [low, high], color=colour, lw=1.6, solid_capstyle="butt")
    size = 7 if point.label else 5
    fill, edge = (colour, colours.ground) if point.timed else (colours.ground, colour)
    ax.plot(
        [x], [value], mark, ms=size, color=fill, mec=edge, mew=0.8 if point.timed else 1.3, zorder=3
    )


def _log_ticks(ax: Axes, low: float, high: float) -> None:
    ax.set_xscale("log")
    decades = 10.0 ** np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 1)
    ax.xaxis.set_major_locator(FixedLocator([float(m * d) for d in decades for m in (1, 2, 5)]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _stage_legend(figure: Canvas, rows: Sequence[Row], colours: Palette, narrow: bool) -> None:
    present = [stage for stage in STAGES if any(row.stage == stage for row in rows)]
    handles = [
        Line2D([], [], ls="", marker=_MARKS[s][1], color=colours.hues[_MARKS[s][0]], ms=6, label=s)
        for s in present
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=(2 if len(present) == 4 else 3) if narrow else len(present),
        columnspacing=0.9,  # all six stages fit in one line
        handlelength=1.2,
        handletextpad=0.2,
    )


def _name_points(
    figure: Canvas,
    ax: Axes,
    points: Sequence[Point],
    colours: Palette,
) -> None:
    figure.draw_without_rendering()  # settles the layout and the limits, so that extents hold
    figure.set_layout_engine("none")

    def on_page(x: float, y: float) -> tuple[float, float]:
        px, py = ax.transData.transform((x, y))
        return float(px), float(py)

    marks, obstacles = [], []
    for point in points:
        low, value, high = point.shown
        x, y = on_page(point.x[1], value)
        if point.label:
            marks.append((x, y))
        bottom, top = on_page(point.x[1], low)[1], on_page(point.x[1], high)[1]
        left, right = on_page(point.x[0], value)[0], on_page(point.right, value)[0]
        obstacles += [(x - 5, y - 5, x + 5, y + 5), (x - 2, bottom, x + 2, top)]
        obstacles.append((left, y - 1.5, right + 3, y + 1.5))
    texts = [
        ax.text(0, 0, words.short(p.label), parse_math=False, fontsize=8.5, transform=None)
        for p in points
        if p.label
    ]
    extents = [text.get_window_extent() for text in texts]
    area = ax.bbox
    frame: Box = (area.x0 + 2, area.y0 + 2, area.x1, area.y1)
    placed = place(marks, [(e.width, e.height) for e in extents], obstacles, frame)
    for text, extent, mark, spot in zip(texts, extents, marks, placed, strict=True):
        left, bottom, right, top = spot.box
        text.set_position((left - extent.x0, bottom - extent.y0))
        if spot.needs_leader:
            near = (min(max(mark[0], left), right), min(max(mark[1], bottom), top))
            line = Line2D(
                *zip(mark, near, strict=True), color=colours.muted, lw=0.6, transform=None
            )
            figure.add_artist(line)
