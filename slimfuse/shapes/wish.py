"""What a recipe wishes of the target's sizes: numbers, ratios, a budget."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from slimfuse.errors import ShapeError
from slimfuse.families import Shape

Kind = Literal["params", "flops", "latency_ratio"]
KINDS: tuple[str, ...] = get_args(Kind)
AXES = tuple(f.name for f in fields(Shape))


@dataclass(frozen=True)
class Budget:
    """The most that the target may cost; exactly met counts as met.

    kind: "params" (weights, a count), "flops" (per sample, 2 per multiply-add) or
    "latency_ratio" (measured median latency divided by the parent's).
    value: an int is absolute, a float in (0, 1] a ratio to the anchor parent's; a latency is
    always a ratio. Raises ShapeError for any other value.
    """

    kind: Kind
    value: int | float

    def __post_init__(self) -> None:
        where = f"target.budget.{self.kind}"
        if self.kind not in KINDS:
            raise ShapeError(
                "there is no such budget",
                where="target.budget",
                got=self.kind,
                allowed=", ".join(KINDS),
            )
        if not (_is_ratio(self.value) or (self.kind != "latency_ratio" and _is_size(self.value))):
            raise ShapeError(
                "the budget is out of range",
                where=where,
                got=self.value,
                allowed="a ratio in (0, 1]"
                + ("" if self.kind == "latency_ratio" else ", or a whole number from 1"),
            )

    def meets(self, amount: float, reference: float) -> bool:
        """Say whether a shape of this amount is within; reference: the parent's amount."""
        used = amount / reference if isinstance(self.value, float) else amount
        return used <= self.value

    def __str__(self) -> str:
        what = "measured latency" if self.kind == "latency_ratio" else self.kind
        if isinstance(self.value, float):
            return f"{what} up to {self.value:g} of the parent's"
        return f"{what} up to {self.value:,}"


@dataclass(frozen=True)
class Wish:
    """The sizes asked for: an int is absolute, a float in (0, 1] a ratio to the anchor parent's.

    None without a budget: hidden_size, heads and depth as the parent's (the heads get smaller),
    intermediate_size in proportion to hidden_size. With a budget, the axes in `free` that are
    None shrink until it is met; an axis with a number or a ratio keeps it. Heads that are free
    together with hidden_size keep the parent's head size. Raises ShapeError for values out of
    range; whether the sizes fit together is `resolve`'s matter.
    """

    hidden_size: int | float | None = None
    num_attention_heads: int | float | None = None
    intermediate_size: int | float | None = None
    num_hidden_layers: int | float | None = None
    budget: Budget | None = None
    free: tuple[str, ...] = ("hidden_size", "intermediate_size")

    def __post_init__(self) -> None:
        for axis in AXES:
            value = self.given(axis)
            if value is not None and not (_is_size(value) or _is_ratio(value)):
                raise ShapeError(
                    f"{axis} is out of range",
                    where=f"target.{axis}",
                    got=value,
                    allowed="a whole number from 1, or a ratio to the parent's in (0, 1]",
                )
        unknown = [axis for axis in self.free if axis not in AXES]
        if unknown:
            raise ShapeError(
                "there is no such size to shrink",
                where="target.budget.free",
                got=", ".join(unknown),
                allowed=", ".join(AXES),
            )
        if self.budget is not None and not self.shrinking:
            raise ShapeError(
                "the budget has nothing to shrink: every free size is given",
                where="target.budget",
                got="; ".join(f"{a} {self.given(a)}" for a in self.free) or "no free size",
                allowed="one of the free sizes not given",
                hint="leave one of them out, or name another in target.budget.free",
            )

    def given(self, axis: str) -> int | float | None:
        """Return what was asked of one axis."""
        value: int | float | None = getattr(self, axis)
        return value

    @property
    def shrinking(self) -> tuple[str, ...]:
        """The axes that the budget may shrink; none without a budget."""
        if self.budget is None:
            return ()
        return tuple(a for a in AXES if a in self.free and self.given(a) is None)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_ratio(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1
