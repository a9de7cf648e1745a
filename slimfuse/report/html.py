"""The report as one HTML file that opens offline, without script, in light and dark."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from slimfuse.report import words
from slimfuse.report._canvas import THEMES, Theme
from slimfuse.report.budget import budget, told
from slimfuse.report.facts import facts
from slimfuse.report.figures import draw
from slimfuse.report.pareto import front, of_the_shape
from slimfuse.report.rows import Finding, Picture, Report, Speedup
from slimfuse.report.scatter import accuracy_latency, plottable
from slimfuse.report.verdict import headline, primary_metric, reference, verdict
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


def render_html(report: Report) -> str:
    """Return the report as one self-contained page; every text of the user is escaped."""
    plots = _plots(report)
    return page(
        "template.html.j2",
        report=report,
        title=report.name,
        kind="report",
        measured_in="run",
        clauses=verdict(report).split(" · "),
        facts=facts(report),
        spent=_spent(report),
        base=reference(report),
        metrics=words.metric_order(report.rows, report.metric),
        conditions=report.conditions,
        plot=plots[0] if plots else None,
        more_plots=plots[1:],
        unplotted=_unplotted(report),
        speedups=_speedups(report),
        groups=_groups(report),
        tree=tree(report.settings),
        passed=sum(gate.passed for gate in report.gates),
        environment=sorted(report.environment.items()),
        timings=sorted(report.timings.items(), key=lambda item: (-item[1], item[0])),
        total=sum(report.timings.values()),
    )


def tree(value: Any, indent: int = 0) -> str:
    """Return plain data as an indented tree that reads like YAML, keys in natural order."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        keys = sorted(value, key=words.natural)
        return "\n".join(f"{pad}{key}:{_under(value[key], indent)}" for key in keys)
    if isinstance(value, list) and value:
        # "- " is as wide as one indent, so an item's keys line up under its first
        return "\n".join(f"{pad}- {tree(item, indent + 1).lstrip()}" for item in value)
    return f"{pad}{_scalar(value)}"


def _under(value: Any, indent: int) -> str:
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return f" [{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, dict | list) and value:
        return "\n" + tree(value, indent + 1)
    return f" {_scalar(value)}"


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower() if value is not None else "null"
    return {"": '""'}.get(str(value), str(value)) if value != {} else "{}"


def page(name: str, **values: Any) -> str:
    """Return a template of this folder with its values; texts are escaped, the style is inside."""
    style = Markup(_text("style.css"))  # noqa: S704  # our own file, no user's text
    return filled(name, words=words, style=style, **values)


def filled(name: str, **values: Any) -> str:
    """Return a template of this folder with its values; texts are escaped."""
    return _environment().get_template(name).render(**values)


@cache
def _environment() -> Environment:
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=FunctionLoader(_text),
    )  # fmt: skip


def _text(name: str) -> str:
    return resources.files("slimfuse.report").joinpath(name).read_text(encoding="utf-8")


def drawn(
    title: str,
    caption: str,
    alt: str,
    svgs: dict[Theme, str],
    narrow: dict[Theme, str] | None = None,
) -> Drawn:
    """Return a picture for a page, from its <svg> in both themes; narrow: the same for phones."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svgs["light"])
    assert box is not None
    uris = {
        theme: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        for theme, svg in svgs.items()
    }
    width, height = (round(float(points) * 96 / 72) for points in box.groups())
    small = drawn(title, caption, alt, narrow) if narrow is not None else None
    return Drawn(title, caption, alt, uris["light"], uris["dark"], width, height, small)


def _groups(report: Report) -> list[tuple[str, list[Finding], list[Drawn]]]:
    """Return tables and pictures by group: those with tables first, in the order they came."""
    every: tuple[Finding | Picture, ...] = (*report.findings, *report.pictures)
    names = dict.fromkeys(one.group for one in every)
    return [
        (
            name,
            [table for table in report.findings if table.group == name],
            [_drawn(picture) for picture in report.pictures if picture.group == name],
        )
        for name in names
    ]


def _drawn(picture: Picture) -> Drawn:
    svgs = {theme: draw(picture, theme) for theme in THEMES}
    alt = picture.alt or f"{picture.kind}: {picture.title}"
    return drawn(picture.title, picture.caption, alt, svgs)


def _spent(report: Report) -> Drawn | None:
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
        {theme: waterfall(found, theme) for theme in THEMES},
        {theme: waterfall(found, theme, narrow=True) for theme in THEMES},
    )


def _speedups(report: Report) -> dict[tuple[str, str], dict[tuple[int, int], Speedup]]:
    """Return the speed-ups by (model, base), then by (threads, batch)."""
    out: dict[tuple[str, str], dict[tuple[int, int], Speedup]] = {}
    for s in report.speedups:
        out.setdefault((s.other, s.base), {})[s.threads, s.batch] = s
    return out


def _plots(report: Report) -> list[Drawn]:
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
            f"{row.name} {words.measured(metric, shown)} at {words.number(x.p50_ms)} ms"
            for row, shown, x in points
        )
        hollow = "; ".join(
            f"{row.name} {words.measured(metric, shown)}"
            for row, shown, _ in plottable(borrowed, threads, batch, metric)
        )
        svgs = [
            {
                theme: accuracy_latency(
                    report.rows, threads, batch, metric=metric, theme=theme, front=tied,
                    borrowed=borrowed, narrow=narrow,
                )
                for theme in THEMES
            }
            for narrow in ((False, True) if (threads, batch) == first else (False,))
        ]  # fmt: skip
        out.append(
            drawn(
                f"{metric.capitalize()} against latency, {where}",
                f"{better} and to the left is better. The upright bar is the 95 % interval of "
                f"{metric}, the level one runs from the p50 to the p90 latency. "
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


def _unplotted(report: Report) -> list[str]:
    metric, at = primary_metric(report), headline(report)
    if metric is None or at is None:
        return []
    shown = {row.name for row, _, _ in plottable(report.rows, *at, metric)}
    shown |= {row.name for row in of_the_shape(report, *at)}
    return [row.name for row in report.rows if row.name not in shown]
