"""The report's pictures as SVG text, drawn from plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from slimfuse.errors import SlimfuseError
from slimfuse.report import words
from slimfuse.report._canvas import Palette, Theme, canvas, to_svg
from slimfuse.report._labels import Box, place
from slimfuse.report.rows import STAGES, Figure, Latency, Picture, Row

MAX_CELLS = 256
"""A heatmap's side above which cells are averaged: a screen shows no more."""
MAX_POINTS = 512
_DASHES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2)))
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


def draw(picture: Picture, theme: Theme = "light") -> str:
    """Return the picture as one self-contained <svg> on a transparent ground.

    Heatmaps beyond 256 cells a side and lines beyond 512 points show block means, and say so.
    """
    kinds: dict[str, Callable[[dict[str, Any], Theme], str]] = {
        "heatmap": _heatmap,
        "lines": _lines,
        "bars": _bars,
    }
    return kinds[picture.kind](picture.data, theme)


def block_means(matrix: NDArray[np.float64], limit: int = MAX_CELLS) -> NDArray[np.float64]:
    """Return `matrix` (rows, columns) with at most `limit` cells a side, each a block's mean."""
    for axis in (0, 1):
        length = matrix.shape[axis]
        step = -(-length // limit)
        if step > 1:
            starts = np.arange(0, length, step)
            sizes = np.diff(np.append(starts, length))  # the last block may be short
            sums = np.add.reduceat(matrix, starts, axis=axis)
            matrix = sums / (sizes[:, None] if axis == 0 else sizes[None, :])
    return matrix


@dataclass(frozen=True)
class Point:
    """A row in a plot: its figure (low, value, high, as shown), and from where to where it is in x.

    named: whether its name stands beside it.
    """

    row: Row
    shown: tuple[float, float, float]
    x: tuple[float, float]
    named: bool = True


def accuracy_latency(
    rows: Sequence[Row],
    threads: int,
    batch: int,
    *,
    metric: str = "accuracy",
    theme: Theme = "light",
    front: Sequence[str] = (),
    unnamed: Sequence[str] = (),
) -> str:
    """Return the plot of `metric` with its interval against p50 latency, every row named.

    front: rows that a line ties, from left to right; unnamed: rows without a name beside them.

    Raises: SlimfuseError when no row has both figures; ask `plottable` first.
    """
    found = plottable(rows, threads, batch, metric)
    points = [
        Point(row, _scaled(metric, shown), (x.p50_ms, x.p90_ms), row.name not in unnamed)
        for row, shown, x in found
    ]
    label = f"latency p50, ms ({words.condition(threads, batch)})"
    return _scatter(points, label, metric, theme, front)


def accuracy_size(
    rows: Sequence[Row],
    *,
    metric: str,
    theme: Theme = "light",
    front: Sequence[str] = (),
    unnamed: Sequence[str] = (),
) -> str:
    """Return the plot of `metric` with its interval against the number of parameters.

    front, unnamed: see `accuracy_latency`. Raises: SlimfuseError when no row has the metric.
    """
    most = max((row.params for row in rows), default=0)
    step, prefix = (1e6, "millions") if most >= 1e6 else (1e3, "thousands")
    points = [
        Point(row, _scaled(metric, row.metrics[metric]), (row.params / step,) * 2,
              row.name not in unnamed)
        for row in rows
        if metric in row.metrics
    ]  # fmt: skip
    return _scatter(points, f"parameters, {prefix}", metric, theme, front)


def _scatter(
    points: Sequence[Point], label: str, metric: str, theme: Theme, front: Sequence[str]
) -> str:
    if not points:
        raise SlimfuseError(f"no row has both {metric} and what it is drawn against", where=label)
    with canvas(4.8, 3.3, theme) as (figure, ax, colours):
        tied = sorted((p.x[0], p.shown[1]) for p in points if p.row.name in front)
        if len(tied) > 1:
            x, y = zip(*tied, strict=True)
            ax.plot(x, y, color=colours.muted, lw=1, ls=(0, (4, 2)), zorder=1)
        for point in points:
            _point(ax, point, colours)
        _, unit = words.scale(metric, points[0].row.metrics[metric])
        ax.set_xlabel(label)
        ax.set_ylabel(f"{metric}, {unit}" if unit else metric)
        ax.margins(0.14, 0.16)
        spread = [point.x[0] for point in points]
        if max(spread) > 4 * min(spread) > 0:
            _log_ticks(ax, min(spread), max(point.x[1] for point in points))
        _stage_legend(figure, [point.row for point in points], colours)
        _name_points(figure, ax, points, colours)
        return to_svg(figure)


def plottable(
    rows: Sequence[Row], threads: int, batch: int, metric: str
) -> list[tuple[Row, Figure, Latency]]:
    """Return the rows that have both the metric and a latency under these conditions."""
    found = ((row, row.metrics.get(metric), row.at(threads, batch)) for row in rows)
    return [(row, shown, latency) for row, shown, latency in found if shown and latency]


def _scaled(metric: str, shown: Figure) -> tuple[float, float, float]:
    factor, _ = words.scale(metric, shown)
    low = shown.value if shown.low is None else min(shown.low, shown.value)
    high = shown.value if shown.high is None else max(shown.high, shown.value)
    return low * factor, shown.value * factor, high * factor


def _point(ax: Axes, point: Point, colours: Palette) -> None:
    hue, mark = _MARKS[point.row.stage]
    colour = colours.hues[hue]
    low, value, high = point.shown
    x = point.x[0]
    if point.named:
        ax.plot(point.x, [value, value], color=colour, lw=1, alpha=0.55)
        ax.plot([x, x], [low, high], color=colour, lw=1.6, solid_capstyle="butt")
    size = 7 if point.named else 5
    ax.plot([x], [value], mark, ms=size, color=colour, mec=colours.ground, mew=0.8, zorder=3)


def _log_ticks(ax: Axes, low: float, high: float) -> None:
    ax.set_xscale("log")
    decades = 10.0 ** np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 1)
    ax.xaxis.set_major_locator(FixedLocator([float(m * d) for d in decades for m in (1, 2, 5)]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _stage_legend(figure: Canvas, rows: Sequence[Row], colours: Palette) -> None:
    present = [stage for stage in STAGES if any(row.stage == stage for row in rows)]
    handles = [
        Line2D([], [], ls="", marker=_MARKS[s][1], color=colours.hues[_MARKS[s][0]], ms=6, label=s)
        for s in present
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(present),
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
        x, y = on_page(point.x[0], value)
        if point.named:
            marks.append((x, y))
        bottom, top = on_page(point.x[0], low)[1], on_page(point.x[0], high)[1]
        right = on_page(point.x[1], value)[0]
        obstacles += [(x - 5, y - 5, x + 5, y + 5), (x - 2, bottom, x + 2, top)]
        obstacles.append((x, y - 1.5, right + 3, y + 1.5))
    texts = [
        ax.text(0, 0, words.short(p.row.name), parse_math=False, fontsize=8.5, transform=None)
        for p in points
        if p.named
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


def _heatmap(data: dict[str, Any], theme: Theme) -> str:
    full = np.asarray(data["matrix"], dtype=np.float64)
    matrix = block_means(full)
    signed = bool(matrix.min() < 0 < matrix.max())
    reach = float(np.abs(matrix).max())
    with canvas(4.0, 3.1, theme) as (figure, ax, colours):
        image = ax.imshow(
            matrix,
            aspect="auto",
            interpolation="none",  # one cell, one pixel of the embedded picture
            cmap="PuOr" if signed else "viridis",
            vmin=-reach if signed else None,
            vmax=reach if signed else None,
            extent=(-0.5, full.shape[1] - 0.5, full.shape[0] - 0.5, -0.5),
        )
        ax.grid(visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel(words.short(data["xlabel"], 48), parse_math=False)
        ax.set_ylabel(words.short(data["ylabel"], 36), parse_math=False)
        bar = figure.colorbar(image, ax=ax, pad=0.02, aspect=28)
        bar.outline.set_visible(False)
        assert bar.solids is not None
        bar.solids.set_rasterized(True)  # 256 paths otherwise
        if matrix.shape != full.shape:
            steps = tuple(-(-n // MAX_CELLS) for n in full.shape)
            _aside(ax, f"each cell: mean of a {steps[0]} × {steps[1]} block", colours)
        return to_svg(figure)


def _lines(data: dict[str, Any], theme: Theme) -> str:
    # natural order, not the dict's: a report read back from its sorted JSON looks the same
    series = sorted(data["series"].items(), key=lambda item: words.natural(item[0]))
    with canvas(4.0, 2.9, theme) as (figure, ax, colours):
        thinned = 1
        for index, (name, line) in enumerate(series):
            xy = np.asarray([line["x"], line["y"]], dtype=np.float64)
            step = -(-xy.shape[1] // MAX_POINTS)
            thinned = max(thinned, step)
            x, y = xy if step == 1 else np.stack([block_means(v[None], MAX_POINTS)[0] for v in xy])
            hue = colours.hues[index % len(colours.hues)]
            dash = _DASHES[index % len(_DASHES)]
            mark = "o" if len(x) <= 24 else ""
            ax.plot(x, y, marker=mark, ls=dash, color=hue, lw=1.6, ms=3.5, label=words.short(name))
        if len(series) > 1:
            handles = list(ax.lines)
            widest = max(len(str(line.get_label())) for line in handles)
            columns = min(len(series), 3 if widest <= 12 else 2 if widest <= 20 else 1)
            legend = figure.legend(
                handles=handles,
                loc="outside upper left",
                ncols=columns,
                handlelength=2.4,
            )
            for text in legend.get_texts():
                text.set_parse_math(False)
        ax.set_xlabel(words.short(data["xlabel"], 48), parse_math=False)
        ax.set_ylabel(words.short(data["ylabel"], 36), parse_math=False)
        if thinned > 1:
            _aside(ax, f"each point: mean of up to {thinned}", colours)
        return to_svg(figure)


def _bars(data: dict[str, Any], theme: Theme) -> str:
    labels, values = [words.short(label, 24) for label in data["labels"]], data["values"]
    many = len(labels) > 32
    height = 2.9 if many else max(1.6, 0.8 + 0.24 * len(labels))
    with canvas(4.0, height, theme) as (figure, ax, colours):
        at = np.arange(len(labels))
        if many:  # too many to name: index along x
            ax.bar(at, values, color=colours.hues[0], width=0.9)
            ax.set_ylabel(words.short(data["ylabel"], 36), parse_math=False)
            ax.set_xlabel(f"{labels[0]} … {labels[-1]}", parse_math=False)
            ax.grid(visible=False, axis="x")
        else:  # horizontal: long names stay level
            bars = ax.barh(at, values, color=colours.hues[0], height=0.68)
            ax.bar_label(bars, [words.number(float(v)) for v in values], padding=3, fontsize=8.5)
            ax.set_yticks(at, labels, parse_math=False)
            ax.invert_yaxis()
            ax.set_xlabel(words.short(data["ylabel"], 48), parse_math=False)
            ax.tick_params(axis="y", length=0)
            ax.grid(visible=False, axis="y")
            ax.margins(x=0.16)
        return to_svg(figure)


def _aside(ax: Axes, text: str, colours: Palette) -> None:
    ax.set_title(text, loc="right", fontsize=7.5, color=colours.muted, pad=3)
