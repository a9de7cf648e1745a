"""The quality budget drawn: a bar a stage, from the figure before it to the figure after it."""

from __future__ import annotations

from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from slimfuse.report import words
from slimfuse.report._canvas import Theme, canvas, to_svg
from slimfuse.report.budget import Budget

STEEP = 8.0
"""A figure that grows as many times over (a perplexity) is drawn on a logarithmic axis."""


def waterfall(found: Budget, theme: Theme = "light", *, narrow: bool = False) -> str:
    """Return the picture of a budget: marks are figures with their intervals, bars the changes.

    narrow: for a phone's screen.
    """
    factor, unit = words.scale(found.metric, found.start)
    values = [found.start.value * factor, *(s.figure.value * factor for s in found.steps)]
    names = [found.parent.name, *(step.row.name for step in found.steps), "result"]
    count = len(found.steps)
    low, high = min(values), max(values)
    steep = low > 0 and high > STEEP * low
    room = 0.25 * (high - low) or 0.05 * abs(high) or 1.0
    ends = [
        x for f in (found.start, found.steps[-1].figure) for x in (f.low, f.high) if x is not None
    ]
    floor = (
        min([low, *(e * factor for e in ends)]) / 1.2
        if steep
        else min([low, *(e * factor for e in ends)]) - 0.4 * room
    )
    top = max([high, *(e * factor for e in ends)])
    ceiling = top * 2.2 if steep else top + 0.9 * room
    size = (3.5, 1.0 + 0.36 * (count + 2)) if narrow else (5.6, 1.0 + 0.36 * (count + 2))
    with canvas(*size, theme) as (figure, ax, colours):
        ink, whole = colours.ink, colours.muted
        better, worse = colours.hues[2], colours.hues[1]
        if steep:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(FixedLocator(_ticks(floor, high)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(floor, ceiling)
        for place, whole_figure in ((0, found.start), (count + 1, found.steps[-1].figure)):
            value = whole_figure.value * factor
            if whole_figure.low is not None and whole_figure.high is not None:
                ends = [whole_figure.low * factor, whole_figure.high * factor]
                ax.plot(ends, [place, place], color=whole, lw=1.6, solid_capstyle="butt")
            ax.plot([value], [place], "D", ms=6, color=ink, mec=colours.ground, mew=0.8, zorder=3)
            ax.annotate(
                words.bare(found.metric, whole_figure, whole_figure.value),
                (value, place),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
            )
        for place, step in enumerate(found.steps, 1):
            before, after = values[place - 1], values[place]
            left, right = min(before, after), max(before, after)
            lost = step.spent > 0
            ax.barh(
                place,
                right - left,
                left=left,
                height=0.62,
                color=worse if lost else better,
                hatch="////" if lost else None,
                edgecolor=colours.ground,
                linewidth=0,
            )
            if found.none(step.spent):
                ax.plot([after, after], [place - 0.31, place + 0.31], color=whole, lw=2)
            ax.annotate(
                found.signed(step.spent),
                (right, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        for place, value in enumerate(values):
            ax.plot([value, value], [place, place + 1], color=whole, lw=0.7, ls=":", zorder=0.5)
        ax.set_yticks(range(count + 2), [words.short(n, 22) for n in names], parse_math=False)
        ax.set_ylim(count + 1.5, -0.9)
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.set_xlabel(f"{found.metric}, {unit}" if unit else found.metric, parse_math=False)
        return to_svg(figure)


def _ticks(low: float, high: float) -> list[float]:
    ticks, step = [], 10.0**-12
    while step < 2 * high:
        ticks += [m * step for m in (1, 2, 5) if low <= m * step <= 2 * high]
        step *= 10
    return ticks
