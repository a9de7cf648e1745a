"""The report as one HTML file that opens offline, without script, in light and dark."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from slimfuse.report import words
from slimfuse.report.facts import facts
from slimfuse.report.panels import Drawn, drawn_picture, quality_plots, spent
from slimfuse.report.pareto import of_the_shape
from slimfuse.report.rows import Finding, Report, Speedup
from slimfuse.report.scatter import plottable
from slimfuse.report.verdict import headline, primary_metric, reference, verdict


def render_html(report: Report) -> str:
    """Return the report as one self-contained page; every text of the user is escaped."""
    plots = quality_plots(report)
    return page(
        "template.html.j2",
        report=report,
        title=report.name,
        kind="report",
        measured_in="run",
        clauses=verdict(report).split(" · "),
        facts=facts(report),
        spent=spent(report),
        base=reference(report),
        metrics=words.metric_order(report.rows, report.metric),
        conditions=report.conditions,
        plot=plots[0] if plots else None,
        more_plots=plots[1:],
        unplotted=_unplotted(report),
        speedups=_speedups(report),
        groups=_groups(report),
        pictured=any(one.image for one in report.examples),
        intervals=any(words.p50_interval(x) for row in report.rows for x in row.latency),
        texted=any(one.text for one in report.examples),
        labelled=any(one.label for one in report.examples),
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


def _groups(report: Report) -> list[tuple[str, list[Finding], list[Drawn]]]:
    """Return tables and pictures by group: those without pictures first, in the order they came."""
    pictured = dict.fromkeys(picture.group for picture in report.pictures)
    names = [
        name for name in dict.fromkeys(f.group for f in report.findings) if name not in pictured
    ]
    names += pictured
    return [
        (
            name,
            [table for table in report.findings if table.group == name],
            [drawn_picture(picture) for picture in report.pictures if picture.group == name],
        )
        for name in names
    ]


def _speedups(report: Report) -> dict[tuple[str, str], dict[tuple[int, int], Speedup]]:
    """Return the speed-ups by (model, base), then by (threads, batch)."""
    out: dict[tuple[str, str], dict[tuple[int, int], Speedup]] = {}
    for s in report.speedups:
        out.setdefault((s.other, s.base), {})[s.threads, s.batch] = s
    return out


def _unplotted(report: Report) -> list[str]:
    metric, at = primary_metric(report), headline(report)
    if metric is None or at is None:
        return []
    shown = {row.name for row, _, _ in plottable(report.rows, *at, metric)}
    shown |= {row.name for row in of_the_shape(report, *at)}
    return [row.name for row in report.rows if row.name not in shown]
