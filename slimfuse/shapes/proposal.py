"""What the planner hands back: the shape, its cost, the reasons, and what stands beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slimfuse.errors import ShapeError
from slimfuse.families import Shape
from slimfuse.shapes.budget import Meter
from slimfuse.shapes.ladder import changed

HEADER = ("", "shape", "params", "ratio", "FLOPs", "ratio", "latency", "why not")


@dataclass(frozen=True)
class Option:
    """A legal shape and its cost; ratios are to the anchor parent's; latency where measured."""

    shape: Shape
    params: int
    flops: int
    params_ratio: float
    flops_ratio: float
    latency_ratio: float | None = None


@dataclass(frozen=True)
class Refusal:
    """A shape that was not taken: what was wrong (`key`), with which value, what may be."""

    shape: Shape
    key: str
    got: str
    allowed: str
    why: str

    @property
    def reason(self) -> str:
        """The refusal as one line."""
        prefix = "" if self.key in self.why else f"{self.key}: "
        return f"{prefix}{self.why}; got {self.got}, allowed {self.allowed}"


@dataclass(frozen=True)
class Proposal:
    """The shape to build (`config` has it), why, and its neighbours.

    notes: sentences on defaults, roundings and the budget. refused: nearby shapes that are
    illegal or over the budget. alternatives: nearby legal shapes within the budget.
    measured: (shape, latency ratio) in the order of measuring.
    """

    chosen: Option
    config: Any
    notes: tuple[str, ...]
    refused: tuple[Refusal, ...]
    alternatives: tuple[Option, ...]
    measured: tuple[tuple[Shape, float], ...] = ()

    @property
    def shape(self) -> Shape:
        """The shape to build."""
        return self.chosen.shape

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of a table under HEADER: the choice, alternatives, refusals."""
        rows = [_cells("chosen", self.chosen)]
        rows += [_cells("possible", option) for option in self.alternatives]
        empty = ("",) * (len(HEADER) - 3)
        rows += [("refused", str(r.shape), *empty, r.reason) for r in self.refused]
        return rows


@dataclass
class Draft:
    """What gathers while one wish is resolved."""

    meter: Meter
    notes: list[str] = field(default_factory=list)
    tried: list[tuple[str, int]] = field(default_factory=list)  # plain roundings, illegal
    refused: dict[Shape, Refusal] = field(default_factory=dict)

    def refuse(self, shape: Shape, error: ShapeError) -> None:
        """Keep a family's refusal."""
        self.refused[shape] = Refusal(
            shape,
            (error.where or "target").removeprefix("target."),
            str(error.got),
            str(error.allowed),
            error.what,
        )

    def option(self, shape: Shape) -> Option:
        """Return a legal shape with its cost."""
        meter, top = self.meter, self.meter.top
        params, flops = meter.params(shape), meter.flops(shape)
        latency = 1.0 if shape == top else meter.measured.get(shape)
        ratios = params / meter.params(top), flops / meter.flops(top)
        return Option(shape, params, flops, *ratios, latency)

    def nearest(self, base: Shape, axis: str, goal: float, *, follow: bool = False) -> int:
        """Return the legal value nearest to `goal`, the larger at a tie; ShapeError if none.

        follow: the MLP's width steps with the stream's.
        """
        values = range(1, getattr(self.meter.top, axis) + 1)
        first: ShapeError | None = None
        for value in sorted(values, key=lambda v: (abs(v - goal), -v)):
            error = self.meter.why_illegal(changed(base, axis, value, follow=follow))
            if error is None:
                return value
            if first is None:  # what plain rounding would have taken
                first = error
                self.tried.append((axis, value))
        assert first is not None
        raise first

    def rounded(
        self, base: Shape, axis: str, ratio: float, *, said: bool = True, follow: bool = False
    ) -> int:
        """Return the legal value nearest to a ratio of the parent's, and note the rounding."""
        top = getattr(self.meter.top, axis)
        value = self.nearest(base, axis, ratio * top, follow=follow)
        if said and abs(value - ratio * top) > 1e-9 * top:  # beyond the float of 0.1 · 30
            self.notes.append(
                f"{axis}: {ratio:g} of the parent's {top} is {ratio * top:g}; "
                f"the nearest legal value is {value}."
            )
        return value


def _cells(kind: str, o: Option) -> tuple[str, ...]:
    latency = "" if o.latency_ratio is None else f"{o.latency_ratio:.3f}"
    params, flops = (
        (f"{o.params:,}", f"{o.params_ratio:.3f}"),
        (f"{o.flops:,}", f"{o.flops_ratio:.3f}"),
    )
    return (kind, str(o.shape), *params, *flops, latency, "")
