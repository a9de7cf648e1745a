"""The report's pictures as SVG text, drawn from plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from slimfuse.report import words
from slimfuse.report._canvas import Palette, Theme, canvas, to_svg
from slimfuse.report.rows import Picture

MAX_CELLS = 256
"""A heatmap's side above which cells are averaged: a screen shows no more."""
MAX_POINTS = 512
MAX_COUNTS = 16
"""A side of a table of counts above which the numbers would not be legible."""
_DASHES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2)))


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


def _heatmap(data: dict[str, Any], theme: Theme) -> str:
    full = np.asarray(data["matrix"], dtype=np.float64)
    matrix = block_means(full)
    signed = bool(matrix.min() < 0 < matrix.max())
    names = data.get("rows"), data.get("columns")
    with canvas(4.0, 3.1 if names == (None, None) else 3.8, theme) as (figure, ax, colours):
        image = ax.imshow(
            matrix,
            aspect="auto",
            interpolation="none",  # one cell, one pixel of the embedded picture
            cmap="PuOr" if signed else "viridis",
            norm=_norm(matrix, signed, counts=names != (None, None)),
            extent=(-0.5, full.shape[1] - 0.5, full.shape[0] - 0.5, -0.5),
        )
        ax.grid(visible=False)
        for axis, own in ((ax.yaxis, names[0]), (ax.xaxis, names[1])):
            axis.set_major_locator(MaxNLocator(6, integer=True))
            if own is not None and matrix.shape == full.shape:
                axis.set_ticks(range(len(own)), [words.short(n, 12) for n in own], fontsize=7.5)
        if names[1] is not None and max(len(str(n)) for n in names[1]) > 2:
            ax.tick_params(axis="x", rotation=90)
        if names != (None, None) and max(matrix.shape) <= MAX_COUNTS:
            _counts(ax, matrix, image)
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


def _norm(matrix: NDArray[np.float64], signed: bool, *, counts: bool) -> Normalize:
    reach = float(np.abs(matrix).max())
    if signed:
        return Normalize(-reach, reach)
    # few of many must be seen: of counts the colour follows the root
    return PowerNorm(0.4, 0.0, reach or 1.0) if counts else Normalize(matrix.min(), matrix.max())


def _counts(ax: Axes, matrix: NDArray[np.float64], image: AxesImage) -> None:
    colours = np.asarray(image.cmap(image.norm(matrix)))
    for (row, column), value in np.ndenumerate(matrix):
        if value:
            red, green, blue = colours[row, column, :3]
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6.5,
                    color="#fefefe" if dark else "#010101")  # fmt: skip


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
        if all(float(x).is_integer() for _, line in series for x in line["x"]):
            ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
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
