"""Pictures of benchmarks' tables, for docs/pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
WIDTH, HEIGHT = 3.6, 2.9  # inches, of one panel
FEW = 6  # values of x that all get a tick


@dataclass(frozen=True)
class Line:
    """One curve of a panel: y over x, with y's interval (low, high) where there is one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"
    interval: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Panel:
    """One diagram. x, y: what the axes are, with their units; log: of which axes, as "xy"."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log: str = ""
    names: Mapping[float, str] | None = None


def draw(name: str, panels: Sequence[Panel], columns: int = 3) -> Path:
    """Write panels side by side as docs/pictures/NAME.svg; equal data give equal bytes."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            for line in panel.lines:
                (drawn,) = axes.plot(line.x, line.y, line.style, label=line.name, markersize=3)
                if line.interval is not None:
                    low, high = zip(*line.interval, strict=True)
                    axes.fill_between(line.x, low, high, color=drawn.get_color(), alpha=0.2, lw=0)
            axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
            for letter in panel.log:
                axes.set(**{f"{letter}scale": "log"})
                axis = {"x": axes.xaxis, "y": axes.yaxis}[letter]
                axis.set_major_formatter("{x:g}")  # 20, not 2 × 10¹
                axis.set_minor_formatter("{x:g}")
            places = sorted({x for line in panel.lines for x in line.x})
            if "x" in panel.log and len(places) <= FEW:
                axes.set_xticks(places)
                axes.xaxis.minorticks_off()
            for at, text in (panel.names or {}).items():
                line = panel.lines[0]
                y = line.y[list(line.x).index(at)]
                axes.annotate(text, (at, y), textcoords="offset points", xytext=(4, 4))
            axes.grid(alpha=0.3)
            if len(panel.lines) > 1:
                axes.legend(frameon=False)
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path
