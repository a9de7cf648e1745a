"""Latencies of all candidates of a sweep, measured in one go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from slimfuse.pipeline.deployment import CHILDREN, DENSE, File, Timing
from slimfuse.pipeline.making import Made
from slimfuse.report import Speedup
from slimfuse.report.sweep_rows import DEPLOYED
from slimfuse.store import Store


@dataclass(frozen=True)
class Timed:
    """What was measured, by what the files' content is known by: files that are equal are one."""

    bench: dict[str, Any]

    def of(self, made: Made) -> dict[str, Any]:
        """Return one run's share under its own rows' names, as `Deployment.bench` does."""
        rows: dict[str, list[str]] = {}
        for row, (_, key) in made.files.items():
            rows.setdefault(key, []).append(row)
        latencies = [
            entry | {"name": row}
            for entry in self.bench["latencies"]
            for row in rows.get(entry["name"], [])
        ]
        bases = {*(p.name for p in made.found.job.parents), DENSE}
        ratios = [
            ratio | {"base": base, "other": other}
            for ratio in self.bench["ratios"]
            for base in rows.get(ratio["base"], [])
            for other in rows.get(ratio["other"], [])
            if base in bases and other in CHILDREN
        ]
        return {**self.bench, "latencies": latencies, "ratios": ratios}

    def between(self, made: Mapping[str, Made], threads: int, batch: int) -> list[Speedup]:
        """Return how much faster candidates are than each other, both ways."""
        keys = {name: one.files[DEPLOYED][1] for name, one in made.items()}
        found = []
        for r in self.bench["ratios"]:
            if (r["threads"], r["batch"]) != (threads, batch):
                continue
            bases = [name for name, key in keys.items() if key == r["base"]]
            others = [name for name, key in keys.items() if key == r["other"]]
            for base in bases:
                for other in others:
                    value, low, high = r["value"], r["low"], r["high"]
                    found += [
                        Speedup(base, other, threads, batch, 1 / value, 1 / high, 1 / low),
                        Speedup(other, base, threads, batch, value, low, high),
                    ]
        return found


def time_together(made: Mapping[str, Made], store: Store) -> Timed:
    """Time every file of every candidate, and its parents', in turns."""
    files: dict[str, File] = {}
    pairs: list[tuple[str, str]] = []
    for one in made.values():
        files |= {key: (path, key) for path, key in one.files.values()}
        bases = {*(p.name for p in one.found.job.parents), DENSE}
        pairs += [
            (base[1], other[1])
            for b, base in one.files.items()
            for o, other in one.files.items()
            if b in bases and o in CHILDREN
        ]
    deployed = dict.fromkeys(one.files[DEPLOYED][1] for one in made.values())
    pairs += combinations(deployed, 2)
    first = next(iter(made.values()))
    timing = Timing(store, first.found.job.recipe, first.deployment.usual)
    return Timed(timing.result(files, list(dict.fromkeys(pairs))))
