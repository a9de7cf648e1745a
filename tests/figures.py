"""Figures in prose, and whether a record has them at the rounding that is shown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[+\-−])?(?P<digits>(?:\d{1,3}(?:[ ,]\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:e(?P<power>[+-]?\d+))?(?![\w]*\d)"
)
SILENT = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv \S+|https?://\S+")
"""What holds no figure: code, the targets of links, addresses."""
SPREAD = 0.95


@dataclass(frozen=True)
class Number:
    """A number as it is written, with the decimals that it shows."""

    value: float
    decimals: int

    def shows(self, exact: float) -> bool:
        """Return whether `exact`, or `exact` in per cent, is shown as this number."""
        half = 0.5 * 10.0**-self.decimals + 1e-9  # a tie may be rounded either way
        return any(abs(abs(self.value) - abs(exact) * scale) <= half for scale in (1, 100))


@dataclass(frozen=True)
class Figure:
    """One number, or a mean with its spread."""

    text: str
    parts: tuple[Number, ...]


def numbers(text: str) -> list[tuple[Number, int, int]]:
    """Return the numbers of a text, each with where it begins and ends."""
    found = []
    for match in NUMBER.finditer(text):
        digits, power = re.sub("[ ,]", "", match["digits"]), int(match["power"] or 0)
        decimals = len(digits.partition(".")[2]) - power
        sign = -1 if match["sign"] in ("-", "−") else 1
        found.append((Number(sign * float(digits) * 10.0**power, decimals), *match.span()))
    return found


def figures(text: str) -> Iterator[Figure]:
    """Yield the figures of a passage: `a ± b` as one, every other number as one of its own."""
    text = SILENT.sub(lambda found: " " * len(found[0]), text)
    found = numbers(text)
    while found:
        (first, start, end), *found = found
        if found and text[end : found[0][1]].strip(" *%") == "±":
            yield Figure(text[start : found[0][2]], (first, found.pop(0)[0]))
        else:
            yield Figure(text[start:end], (first,))


def is_measured(text: str) -> bool:
    """Return whether a passage gives a result: a spread, a share in per cent, or a factor."""
    text = SILENT.sub(" ", text).replace("95 % interval", " ")
    return bool(re.search(r"± ?\.?\d|\d\s?%|\d\s?×(?! ?\d)", text))


def recorded(figure: Figure, record: Path) -> bool:
    """Return whether a Markdown record, and the JSON beside it, has a figure.

    Of `a ± b` the record has both as neighbours on a line, and the JSON the same two, or numbers
    of which they are mean and half interval (Student's t, 95 %): a series over seeds, or two
    series' differences. Of a number one of both files has it. A record without a JSON is one of
    docs/decisions.
    """
    lines, data = _lines(record), record.with_suffix(".json")
    pairs, values = _data(data) if data.exists() else ((), ())
    if len(figure.parts) == 1:
        (number,) = figure.parts
        return any(_is(number, n) for line in lines for n in line) or any(
            number.shows(value) for value in values if number.decimals > 0
        )
    mean, spread = figure.parts
    shown = any(_is(mean, a) and _is(spread, b) for line in lines for a, b in pairwise(line))
    return shown and (not pairs or any(mean.shows(m) and spread.shows(s) for m, s in pairs))


def _is(number: Number, record: Number) -> bool:
    """Return whether a record's number, of as many decimals or more, is shown as `number`."""
    percent = abs(abs(record.value) * 100 - abs(number.value)) < abs(record.value - number.value)
    known = record.decimals - (2 if percent else 0)
    return known >= number.decimals and number.shows(record.value)


@cache
def _lines(record: Path) -> list[list[Number]]:
    return [[n for n, _, _ in numbers(line)] for line in record.read_text().splitlines()]


@cache
def _data(path: Path) -> tuple[list[tuple[float, float]], list[float]]:
    """Return a JSON's means with half intervals, and neighbours; and all its numbers."""
    pairs: list[tuple[float, float]] = []
    values: list[float] = []

    def visit(node: Any) -> None:
        children = list(node.values()) if isinstance(node, dict) else node
        if not isinstance(children, list):
            return
        own = _numbers(children)
        values.extend(own)
        pairs.extend(pairwise(own))
        several = [_numbers(child) for child in children if isinstance(child, list)]
        by_key = _over_seeds(node)
        differences = [d for group in (several, *by_key) for d in _differences(group)]
        for series in (own, *differences, *(one for group in by_key for one in group)):
            if len(series) > 1:
                pairs.append(_interval(series))
        for child in children:
            visit(child)

    visit(json.loads(path.read_text()))
    return pairs, values


def _numbers(children: list[Any]) -> list[float]:
    return [float(child) for child in children if type(child) in (int, float)]


def _differences(several: list[list[float]]) -> list[list[float]]:
    """Return the differences of any two series of one length."""
    return [
        [x - y for x, y in zip(a, b, strict=True)]
        for a in several
        for b in several
        if a is not b and len(a) == len(b)
    ]


def _over_seeds(node: Any) -> list[list[list[float]]]:
    """Return by key the figures of rows whose names differ in their first number, the seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, row in node.items() if isinstance(node, dict) else ():
        for key, value in row.items() if isinstance(row, dict) else ():
            if type(value) in (int, float):
                series = found.setdefault(key, {}).setdefault(
                    re.sub(r"\d+", "#", name, count=1), []
                )
                series.append(value)
    return [list(group.values()) for group in found.values()]


def _interval(values: list[float]) -> tuple[float, float]:
    n = len(values)
    half = t.ppf((1 + SPREAD) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)
