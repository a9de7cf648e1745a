"""What a sweep measured, as frozen records with a stable JSON form (`sweep.json`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from slimfuse.errors import SlimfuseError
from slimfuse.report.rows import GateResult, Row, Speedup, decoded

SCHEMA = "slimfuse.sweep/1"
"""Raised by one whenever a key changes its meaning or goes away."""

DEPLOYED = "onnx"
"""The row of a candidate that choices go by: its full-precision ONNX file."""


@dataclass(frozen=True)
class Candidate:
    """One finished run of a sweep.

    folder: of the run, in the sweep's folder; shape: the child's; rows: all but the parents';
    front: whether no other candidate beats it; speedup: over the best parent.
    """

    name: str
    folder: str
    overrides: tuple[str, ...]
    shape: str
    rows: tuple[Row, ...]
    gates: tuple[GateResult, ...] = ()
    speedup: Speedup | None = None
    front: bool = False

    @property
    def row(self) -> Row:
        """The file that is judged, under its own name."""
        return next(row for row in self.rows if row.name == DEPLOYED)

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class Trial:
    """One try of a search: the keys' values, and what came out; None where it was refused.

    seconds: what its stages took, those that it shares with others too.
    """

    number: int
    values: dict[str, Any]
    figures: dict[str, float] | None
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Search:
    """The search of one candidate's settings, on held-out training samples.

    space: what was searched, as it was asked for; samples: those held out; taken: the trials whose
    settings went into candidates; goals: what was sought, the metric and where shapes vary params.
    """

    candidate: str
    space: tuple[str, ...]
    goals: dict[str, Literal["higher", "lower"]]
    samples: int
    trials: tuple[Trial, ...]
    taken: tuple[int, ...]


@dataclass(frozen=True)
class SweepReport:
    """All that one sweep measured; latencies and choices are at `threads` and `batch`.

    parents: those of the candidates, each once; base: the best of them, which speed-ups refer to;
    ratios: between candidates, by name; picked: the candidate that is taken, "" for none; nearest:
    the one nearest to the gates where none holds; timings: seconds of each stage, made once.

    Raises: SlimfuseError when the base is no parent, or a model has no figure of the metric.
    """

    name: str
    recipe_path: str
    command: str
    summary: str
    metric: str
    threads: int
    batch: int
    parents: tuple[Row, ...]
    base: str
    candidates: tuple[Candidate, ...]
    picked: str
    reason: str
    nearest: str = ""
    ratios: tuple[Speedup, ...] = ()
    searches: tuple[Search, ...] = ()
    warnings: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        gaps = [f"{self.base!r} is no parent"] * all(row.name != self.base for row in self.parents)
        for one in self.candidates:
            if all(row.name != DEPLOYED for row in one.rows):
                gaps.append(f"{one.name!r} has no row {DEPLOYED!r}")
        judged = [
            *self.parents,
            *(r for c in self.candidates for r in c.rows if r.name == DEPLOYED),
        ]
        gaps += [
            f"{row.name!r} has no {self.metric}" for row in judged if self.metric not in row.metrics
        ]
        if gaps or not self.candidates:
            raise SlimfuseError(
                "a sweep's parts don't fit together",
                where=self.name,
                got="; ".join(gaps) or "no candidate",
            )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the pick and every candidate, compact."""
        from slimfuse.report.notebook import sweep_fragment

        return sweep_fragment(self)

    @property
    def passed(self) -> bool:
        """Whether some candidate passes all gates, where there are any."""
        return any(candidate.passed for candidate in self.candidates)

    @property
    def points(self) -> tuple[Row, ...]:
        """What a plot shows: parents, candidates by their names, their baselines beside them.

        A baseline has its candidate's shape, and so its latency.
        """
        found = list(self.parents)
        for candidate in self.candidates:
            row = candidate.row
            found.append(named(row, candidate.name))
            found += [
                named(other, f"{candidate.name}: {other.name}", row)
                for other in candidate.rows
                if other.stage == "baseline" and other.name != "anchor"
            ]
        return tuple(found)


def sweep_from_json(text: str) -> SweepReport:
    """Return the sweep's figures that `to_json` wrote; raises UserError as `from_json`."""
    return decoded(text, SweepReport, SCHEMA)


def named(row: Row, name: str, timed: Row | None = None) -> Row:
    """Return a row under another name, with the latency of the row `timed` where one is given."""
    latency = row.latency if timed is None else timed.latency
    return Row(
        name, row.stage, row.metrics, row.params, row.flops, row.bytes, latency, None, row.note
    )
