"""A report's pictures as a page holds them: in both themes, with captions and alternative texts."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from slimfuse.report import words
from slimfuse.report._canvas import darkened
from slimfuse.report.budget import budget, told
from slimfuse.report.figures import draw
from slimfuse.report.pareto import front, of_the_shape
from slimfuse.report.rows import Picture, Report
from slimfuse.report.scatter import accuracy_latency, level_bar, plottable
from slimfuse.report.verdict import headline, primary_metric
from slimfuse.report.waterfall import waterfall


@dataclass(frozen=True)
class Drawn:
    """A picture in both themes, as data URIs, with its size in CSS pixels; narrow: for phones."""

    title: str
    caption: str
    alt: str
    light: str
    dark: str
    width: int
    height: int
    narrow: Drawn | None = None


def drawn(title: str, caption: str, alt: str, svg: str, narrow: str | None = None) -> Drawn:
    """Return a picture for a page, from its light <svg>; narrow: the same for phones."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    width, height = (round(float(points) * 96 / 72) for points in box.groups())
    small = drawn(title, caption, alt, narrow) if narrow is not None else None
    return Drawn(title, caption, alt, _uri(svg), _uri(darkened(svg)), width, height, small)


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def drawn_picture(picture: Picture) -> Drawn:
    """Return a picture of a report, drawn."""
    alt = picture.alt or f"{picture.kind}: {picture.title}"
    return drawn(picture.title, picture.caption, alt, draw(picture))


def spent(report: Report) -> Drawn | None:
    """Return the waterfall of the quality budget, its sentence as its caption."""
    found = budget(report)
    if found is None:
        return None
    steps = "; ".join(f"{step.row.name} {found.signed(step.spent)}" for step in found.steps)
    return drawn(
        told(found),
        f"Marks are the {found.metric} of {found.parent.name}, the best parent, and of the last "
        "file, with their 95 % intervals; bars are what each stage changed of it (hatched: lost). "
        "All on the same test samples; the axis need not begin at nought.",
        f"Waterfall of {found.metric} from {found.parent.name}: {steps}.",
        waterfall(found),
        waterfall(found, narrow=True),
    )


def quality_plots(report: Report) -> list[Drawn]:
    """Return the accuracy-against-latency plots, the headline's conditions first."""
    metric, first = primary_metric(report), headline(report)
    if metric is None:
        return []
    better = "Down" if words.lower_is_better(metric) else "Up"
    out = []
    for threads, batch in sorted(report.conditions, key=lambda c: c != first):
        points = plottable(report.rows, threads, batch, metric)
        if not points:
            continue
        where = words.condition(threads, batch)
        tied = front(report.rows, threads, batch, metric)
        borrowed = of_the_shape(report, threads, batch)
        seen = "; ".join(
            f"{row.name} {words.measured(metric, shown)} at {words.p50(x)} ms"
            for row, shown, x in points
        )
        hollow = "; ".join(
            f"{row.name} {words.measured(metric, shown)}"
            for row, shown, _ in plottable(borrowed, threads, batch, metric)
        )
        svgs = [
            accuracy_latency(
                report.rows, threads, batch, metric=metric, front=tied, borrowed=borrowed,
                narrow=narrow,
            )
            for narrow in ((False, True) if (threads, batch) == first else (False,))
        ]  # fmt: skip
        out.append(
            drawn(
                f"{metric.capitalize()} against latency, {where}",
                f"{better} and to the left is better. The upright bar is the 95 % interval of "
                f"{metric}, {level_bar(report.rows, threads, batch)}. "
                + of_front(tied)
                + " Hollow: baselines of the child's shape, at its latency." * bool(hollow),
                f"Scatter plot of {metric} against p50 latency at {where}: {seen}. "
                f"{of_front(tied)}" + f" Baselines of the child's shape: {hollow}." * bool(hollow),
                *svgs,
            )
        )
    return out


def of_front(names: list[str]) -> str:
    """Return which models are on the Pareto front, in a sentence."""
    if len(names) == 1:
        return f"Nothing beats {names[0]}: it is both the best and the quickest."
    return f"The dashed line ties the Pareto front, those that no other beats: {', '.join(names)}."
