"""Which candidates no other one beats, and which one to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slimfuse.report import GateResult


@dataclass(frozen=True)
class Option:
    """A candidate as a choice sees it.

    quality: the task's metric, larger is better; params: a count; p50: in milliseconds; gates: of
    the recipe; budgeted: whether its shape was found to keep a budget.
    """

    name: str
    quality: float
    params: int
    p50: float
    gates: tuple[GateResult, ...] = ()
    budgeted: bool = False

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class Pick:
    """The candidate that is taken, "" for none, and why; nearest: to the gates where none holds."""

    name: str
    reason: str
    nearest: str = ""


Slower = Callable[[str, str], bool]
"""Whether the first one is measurably slower than the second one."""


def front(options: Sequence[Option], slower: Slower) -> list[str]:
    """Return the names of those that no other one beats (Pareto).

    One beats another that is in nothing better and in something worse: quality, parameters, and
    latency as far as its interval tells.
    """

    def beats(a: Option, b: Option) -> bool:
        better = a.quality > b.quality or a.params < b.params or slower(b.name, a.name)
        worse = a.quality < b.quality or a.params > b.params or slower(a.name, b.name)
        return better and not worse

    return [b.name for b in options if not any(beats(a, b) for a in options)]


def choose(options: Sequence[Option], slower: Slower, told: Mapping[str, str]) -> Pick:
    """Return the pick: of those that pass all gates the fastest, else the best within a budget.

    As fast are those that aren't measurably slower than the fastest: of them the smallest is
    taken, of equally small ones the best. told: each one's quality, to read.
    """
    if any(option.gates for option in options):
        passing = [option for option in options if option.passed]
        if not passing:
            return _nearest(options)
        quick = min(passing, key=lambda o: (o.p50, o.params, -o.quality))
        alike = [o for o in passing if o is quick or not slower(o.name, quick.name)]
        best = min(alike, key=lambda o: (o.params, -o.quality, o.p50))
        how = "the only one" if len(passing) == 1 else "the fastest of them"
        if len(alike) > 1:
            small = [o for o in alike if o.params == best.params]
            how = "none is measurably faster, and of those that are as fast it is the smallest"
            if len(small) > 1:
                how = "none is measurably faster, and of the smallest of those it is the best"
        gates = "the gate" if len(best.gates) == 1 else f"all {len(best.gates)} gates"
        verb = "passes" if len(passing) == 1 else "pass"
        return Pick(best.name, f"{len(passing)} of {len(options)} {verb} {gates}; {how}")
    if len(options) == 1:
        return Pick(options[0].name, "the only candidate")
    kept = [option for option in options if option.budgeted]
    if kept:
        best = min(kept, key=lambda o: (-o.quality, o.params, o.p50))
        return Pick(best.name, f"the best within target.budget: {told[best.name]}")
    return Pick("", "the recipe has neither gates nor a budget, so none is picked")


def _nearest(options: Sequence[Option]) -> Pick:
    def missed(option: Option) -> list[GateResult]:
        return [gate for gate in option.gates if not gate.passed]

    nearest = min(
        options, key=lambda o: (len(missed(o)), sum(g.missing for g in missed(o)), o.params)
    )
    failed = "; ".join(f"{g.metric} {g.rule}, measured {g.measured}" for g in missed(nearest))
    return Pick("", f"none passes all gates; {nearest.name} comes nearest: {failed}", nearest.name)
