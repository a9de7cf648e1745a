"""One way to a small, repeatable SVG: no pyplot, no matplotlibrc, no network reference."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

Theme = Literal["light", "dark"]


@dataclass(frozen=True)
class Palette:
    """Ink on a transparent ground, and hues told apart by every common colour vision."""

    ink: str
    muted: str
    grid: str
    ground: str
    hues: tuple[str, ...]


# Okabe & Ito 2008 without its yellow, which vanishes on white; lightened for the dark ground
PALETTES: dict[Theme, Palette] = {
    "light": Palette(
        "#1b1f24",
        "#57606a",
        "#d8dee4",
        "#ffffff",
        ("#0072b2", "#d55e00", "#009e73", "#b5548d", "#b37700", "#3b97cf", "#57606a"),
    ),
    "dark": Palette(
        "#e6e9ee",
        "#9aa5b1",
        "#333b45",
        "#171c23",
        ("#56b4e9", "#ff8a4c", "#2cc79c", "#e39bc3", "#f0c342", "#9ad1f5", "#9aa5b1"),
    ),
}


@contextmanager
def canvas(width: float, height: float, theme: Theme) -> Iterator[tuple[Canvas, Axes, Palette]]:
    """Yield a figure of `width` x `height` inches, its axes and palette, under our style only."""
    colours = PALETTES[theme]
    ours = {
        "axes.edgecolor": colours.muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelcolor": colours.ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.unicode_minus": True,
        "figure.dpi": 72,  # the SVG writer's own: text extents measured before drawing then hold
        "figure.facecolor": "none",
        "font.size": 9.0,
        "grid.color": colours.grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "svg.fonttype": "path",  # the reader's fonts differ; labels placed without overlap stay so
        "svg.hashsalt": "slimfuse",  # same data, same bytes
        "text.color": colours.ink,
        "xtick.color": colours.muted,
        "xtick.labelcolor": colours.ink,
        "ytick.color": colours.muted,
        "ytick.labelcolor": colours.ink,
    }
    with style.context(["default", ours]), warnings.catch_warnings():
        # a name in a script the bundled font lacks shows boxes here, and rightly in the table
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Canvas(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot(), colours


def to_svg(figure: Canvas) -> str:
    """Return the figure as one <svg> element: no prologue, no metadata, paths to 0.01 pt."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]  # the prologue points to a DTD on the network
    svg = re.sub(r'\bd="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    return re.sub(r">\s+<", "><", svg).strip()


def darkened(svg: str) -> str:
    """Return a light <svg> in the colours of the dark theme: drawing it again costs seconds."""
    pairs = dict(zip(_colours("light"), _colours("dark"), strict=True))
    return re.sub("|".join(pairs), lambda m: pairs[m[0]], svg)


def _colours(theme: Theme) -> tuple[str, ...]:
    own = PALETTES[theme]
    return (own.ink, own.muted, own.grid, own.ground, *own.hues)
