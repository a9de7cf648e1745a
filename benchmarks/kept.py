"""Figures that are kept after every row, so that a benchmark may run piece by piece."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common import machine

from slimfuse.pipeline.comparison import interval, lead
from slimfuse.store import write_text

Figures = dict[str, float]


class Kept:
    """Figures by name in a JSON file, written after each row; what is in it isn't measured again.

    conditions: what all of them depend on; a file of other conditions is refused. Rows may be of
    several machines: the file says which of which.
    """

    def __init__(self, file: Path, conditions: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.file, self.conditions = file, json.loads(json.dumps(conditions))
        if fresh:
            file.unlink(missing_ok=True)
        self.cpus: dict[str, str] = {}
        self.rows: dict[str, Figures] = self._read()

    def _read(self) -> dict[str, Figures]:
        """Return the file's rows, of which another process may have made some."""
        if not self.file.is_file():
            return {}
        found = json.loads(self.file.read_text())
        if found["conditions"] != self.conditions:
            raise SystemExit(f"{self.file} was made under other conditions: begin with --fresh")
        self.cpus |= found.get("cpus", {})
        rows: dict[str, Figures] = found["rows"]
        return rows

    def row(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """Return a row's figures, from the file or measured now."""
        if name not in self.rows:
            made = measure()
            self.rows = self._read() | self.rows | {name: made}
            self.cpus[name] = machine()["cpu"]
            told = {"conditions": self.conditions, "rows": self.rows, "cpus": self.cpus}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(told, indent=1) + "\n")
            each = ", ".join(f"{key} {value:.4g}" for key, value in self.rows[name].items())
            print(f"{name}: {each}", flush=True)
        return self.rows[name]

    def record(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return what is written beside the page."""
        kept = {"rows": self.rows, "cpus": self.cpus, "conditions": self.conditions}
        return kept | {"machine": machine(), "seeds": seeds}

    def machine(self) -> str:
        """Return what the figures depend on, with the processors that rows were measured on."""
        here = machine()
        cpus = {self.cpus.get(name, here["cpu"]): None for name in self.rows}
        return "; ".join(f"{k} {v}" for k, v in (here | {"cpu": " and ".join(cpus)}).items())

    def over(self, seeds: Sequence[int], name: str, key: str) -> dict[int, float]:
        """Return a figure by seed, of the rows that are there; {seed} in the name is the seed."""
        names = {seed: name.replace("{seed}", str(seed)) for seed in seeds}
        return {seed: self.rows[n][key] for seed, n in names.items() if n in self.rows}


def kept_parser(seeds: Sequence[int], description: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of kept rows can be asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="*", default=seeds)
    parser.add_argument("--runs", default="runs", help="the folder that the trained models lie in")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--quick", action="store_true", help="a few samples, and no file written")
    return parser


def spread(values: Mapping[int, float], digits: int = 1) -> str:
    """Return mean ± half the 95 % interval over seeds (Student's t), "" of nothing."""
    if not values:
        return ""
    middle, low, high = interval(list(values.values()), 0)
    told = f"{middle:.{digits}f}"
    return told if len(values) == 1 else f"{told} ± {(high - low) / 2:.{digits}f}"


def ahead(first: Mapping[int, float], other: Mapping[int, float], digits: int = 1) -> str:
    """Return the mean of first − other, paired by seed, ± half its 95 % interval; "" of one."""
    found = lead(first, other)
    if found is None:
        return ""
    return f"{found[0]:+.{digits}f} ± {(found[2] - found[1]) / 2:.{digits}f}"


def clear(first: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Return ">", "<" or "=": whether first is above, below or not clearly either (95 %)."""
    found = lead(first, other)
    if found is None or found[1] <= 0 <= found[2]:
        return "="
    return ">" if found[1] > 0 else "<"


def average(values: Mapping[int, float]) -> float:
    """Return the mean over seeds."""
    return mean(values.values())
