"""From a wish to one legal shape, with the reasons for it and what stands beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slimfuse.errors import ShapeError
from slimfuse.families import Family, Shape
from slimfuse.shapes.budget import Meter, TimeRatio, largest
from slimfuse.shapes.descent import Losses, descent, refilled
from slimfuse.shapes.ladder import changed, grid, ladder
from slimfuse.shapes.proposal import Draft, Proposal, Refusal
from slimfuse.shapes.wish import AXES, Budget, Wish

SHOWN = 6  # neighbours of each kind: a table that still fits on a screen


def resolve(
    wish: Wish,
    config: Any,
    family: Family,
    *,
    time_ratio: TimeRatio | None = None,
    losses: Losses | None = None,
) -> Proposal:
    """Return the legal shape that a wish comes to.

    config: the anchor (largest) parent's. Without a budget numbers stand as they are and ratios
    go to the nearest legal value. With one, the largest rung of `ladder` that meets it is taken,
    and what a coarse step of depth or width leaves of a counted budget goes to the finer axes;
    a latency budget calls time_ratio(config) at most ⌈log₂(n + 1)⌉ times for n rungs. losses: what
    a budget is split by between the free sizes, instead of the parent's proportions; see `descent`.
    Raises ShapeError for an illegal number, for a size over the parent's, and for a budget that
    no legal shape meets.
    """
    draft = Draft(Meter(config, family, time_ratio))
    start = _start(wish, draft)
    if wish.budget is None:
        shape = start
        alternatives = _neighbours(wish, shape, draft)
    else:
        shape, alternatives = _fit(wish, wish.budget, start, draft, losses)
    narrowed = draft.meter.narrow(shape)
    if wish.num_attention_heads is None and "num_attention_heads" not in wish.shrinking:
        draft.notes.append(_heads_note(shape, draft.meter))
    for axis, value in draft.tried:
        other = changed(shape, axis, value, follow=_follows(wish, draft.meter))
        error = draft.meter.why_illegal(other)
        if error is not None:
            draft.refuse(other, error)
    return Proposal(
        draft.option(shape),
        narrowed,
        tuple(draft.notes),
        tuple(draft.refused.values())[:SHOWN],
        tuple(draft.option(s) for s in alternatives[:SHOWN]),
        tuple(draft.meter.measured.items()),
    )


def _start(wish: Wish, draft: Draft) -> Shape:
    """Return the shape without the budget: free axes are as large as they can be."""
    meter, top, free = draft.meter, draft.meter.top, wish.shrinking
    hidden, heads = wish.hidden_size, wish.num_attention_heads
    follow, shape = _follows(wish, meter), top
    if meter.tied and isinstance(wish.intermediate_size, int):  # decides which widths are legal
        shape = replace(shape, intermediate_size=wish.intermediate_size)
    if isinstance(heads, int):
        shape = replace(shape, num_attention_heads=heads)
    if isinstance(hidden, int):
        shape = changed(shape, "hidden_size", hidden, follow=follow)
    if isinstance(heads, float) or (heads is None and "num_attention_heads" in free):
        ratio = 1.0 if heads is None else heads
        if isinstance(hidden, int):
            value = draft.rounded(shape, "num_attention_heads", ratio)
        else:  # the width then follows the heads
            value = max(1, int(ratio * top.num_attention_heads + 0.5))
            if value != ratio * top.num_attention_heads:
                draft.notes.append(
                    f"num_attention_heads: {ratio:g} of the parent's {top.num_attention_heads} "
                    f"is {ratio * top.num_attention_heads:g}, rounded to {value}."
                )
        shape = replace(shape, num_attention_heads=value)
    if not isinstance(hidden, int):
        ratio = 1.0 if hidden is None else hidden
        width = draft.rounded(shape, "hidden_size", ratio, follow=follow)
        shape = changed(shape, "hidden_size", width, follow=follow)
    _check_width(shape, meter)

    depth = wish.num_hidden_layers
    if isinstance(depth, float):
        depth = draft.rounded(shape, "num_hidden_layers", depth)
    if depth is not None:
        shape = replace(shape, num_hidden_layers=depth)
    inner = wish.intermediate_size
    if isinstance(inner, float):
        inner = draft.rounded(shape, "intermediate_size", inner)
    elif inner is None and "intermediate_size" not in free:
        share = shape.hidden_size / top.hidden_size
        inner = draft.rounded(shape, "intermediate_size", share, said=False)
        if share < 1:
            draft.notes.append(
                f"intermediate_size: not given, so in proportion to hidden_size "
                f"({shape.hidden_size} of {top.hidden_size}): {inner} of {top.intermediate_size}."
            )
    if inner is not None:
        shape = replace(shape, intermediate_size=inner)
    meter.narrow(shape)  # raises for an illegal number
    return shape


def _follows(wish: Wish, meter: Meter) -> bool:
    """Say whether the MLP's width steps with the stream's: tied by the class, no number given."""
    return meter.tied and not isinstance(wish.intermediate_size, int)


def _check_width(shape: Shape, meter: Meter) -> None:
    """Raise the family's refusal of width and heads, with the heads that would fit."""
    error = meter.why_illegal(shape)
    if error is None:
        return
    heads = shape.num_attention_heads
    fitting = [
        h
        for h in range(1, meter.top.num_attention_heads + 1)
        if meter.why_illegal(replace(shape, num_attention_heads=h)) is None
    ]
    if fitting and error.hint is None:
        near = sorted(sorted(fitting, key=lambda h: abs(h - heads))[:2])
        listed = " or ".join(map(str, near))
        raise ShapeError(
            error.what,
            where=error.where,
            got=error.got,
            allowed=error.allowed,
            hint=f"or num_attention_heads {listed} with hidden_size {shape.hidden_size}",
        ) from error
    raise error


def _heads_note(shape: Shape, meter: Meter) -> str:
    before = meter.family.head_dims(meter.config)
    after = meter.family.head_dims(meter.narrow(shape))
    sizes = f"{after} units each" if before == after else f"{after} units each instead of {before}"
    return (
        f"num_attention_heads: not given, so the parent's {shape.num_attention_heads}, "
        f"with {sizes}."
    )


def _fit(
    wish: Wish, budget: Budget, start: Shape, draft: Draft, losses: Losses | None
) -> tuple[Shape, list[Shape]]:
    """Return the largest rung within the budget, and shapes within it that stand near."""
    meter = draft.meter
    if losses is None:
        rungs = ladder(start, wish.shrinking, meter)
    else:
        rungs = descent(start, wish.shrinking, meter, losses, budget.kind)
    found = largest(rungs, budget, meter)
    if found is None:
        raise _unreachable(wish, budget, rungs[-1], meter)
    shape, names = rungs[found], _listed(wish.shrinking)
    if budget.kind != "latency_ratio" and found > 0:
        if losses is None:
            shape = _fill(wish, budget, start, shape, meter)
        else:
            shape = refilled(start, shape, wish.shrinking, meter, losses, budget)
    used = _used(budget, shape, meter)
    if found == 0:
        draft.notes.append(f"budget: nothing had to shrink; {used} is within {budget}.")
    else:
        how = "by one share of the parent's" if losses is None else "where least is lost by it"
        draft.notes.append(
            f"budget: {names} shrink {how}, to the largest of "
            f"{len(rungs)} steps that meets {budget}: {used}."
        )
        gains = [
            f"{a} {getattr(shape, a)} instead of {getattr(rungs[found], a)}"
            for a in wish.shrinking
            if getattr(shape, a) != getattr(rungs[found], a)
        ]
        if gains:
            draft.notes.append(f"budget: what a coarse step left goes to {_listed(gains)}.")
        if losses is not None:
            draft.notes.append(_allocation_note(wish, budget, start, shape, meter))
        floors = [a for a in wish.shrinking if getattr(shape, a) == getattr(rungs[-1], a)]
        if floors and losses is None:
            draft.notes.append(
                f"budget: {_listed(floors)} can't go lower, so the parent's proportions "
                f"are not kept."
            )
    if budget.kind == "latency_ratio":
        draft.notes.append(
            f"budget: {len(meter.measured)} of {len(rungs)} shapes were measured, by bisection."
        )
        near = sorted(meter.measured, key=lambda s: abs(rungs.index(s) - found))
    else:
        sides = _neighbours(wish, shape, draft)
        near = list(dict.fromkeys(rungs[max(0, found - 1) : found + 2] + sides))
        near.sort(key=lambda s: -meter.amount(budget.kind, s))
    alternatives = []
    for other in near:
        if meter.meets(budget, other):
            alternatives.append(other)
        else:
            allowed = f"up to {_amount(budget, _limit(budget, meter))}"
            got = _amount(budget, meter.amount(budget.kind, other))
            draft.refused[other] = Refusal(other, budget.kind, got, allowed, "over the budget")
    return shape, [s for s in alternatives if s != shape]


def _allocation_note(wish: Wish, budget: Budget, start: Shape, shape: Shape, meter: Meter) -> str:
    """Return what stays of each free size, beside what would if all kept one share.

    Where the budget is a latency, which would have to be measured, that shape has as many FLOPs.
    """
    top, level = meter.top, budget
    if budget.kind == "latency_ratio":
        level = Budget("flops", meter.flops(shape))
    rungs = ladder(start, wish.shrinking, meter)
    found = largest(rungs, level, meter)
    stays = {a: f"{a} {getattr(shape, a) / getattr(top, a):.3f}" for a in wish.shrinking}
    if found is None:
        return f"budget: share of the parent's that stays: {', '.join(stays.values())}."
    other = rungs[found] if found == 0 else _fill(wish, level, start, rungs[found], meter)
    parts = [f"{text} ({getattr(other, a) / getattr(top, a):.3f})" for a, text in stays.items()]
    beside = "a proportional shape" + ("" if level is budget else " of as many FLOPs")
    return f"budget: share of the parent's that stays, beside {beside}: {', '.join(parts)}."


def _fill(wish: Wish, budget: Budget, start: Shape, shape: Shape, meter: Meter) -> Shape:
    """Return the shape after the finer axes have taken what the coarser ones left unused.

    Depth, then width, then heads keep the value they have; each time the axes that are still
    free climb their own ladder again, so that the last, the MLP, is as wide as the budget allows.
    """
    rest = wish.shrinking
    for axis in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if axis not in rest:
            continue
        kept: set[str] = {axis}
        if axis == "hidden_size":
            kept.add("num_attention_heads")  # they fell together where both are free
            if meter.tied:
                kept.add("intermediate_size")  # so did these
        start = replace(start, **{a: getattr(shape, a) for a in kept & set(rest)})
        rest = tuple(a for a in rest if a not in kept)
        if rest:
            rungs = ladder(start, rest, meter)
            found = largest(rungs, budget, meter)
            assert found is not None  # `shape` is on this ladder
            shape = rungs[found]
    return shape


def _unreachable(wish: Wish, budget: Budget, smallest: Shape, meter: Meter) -> ShapeError:
    # heads alone change neither parameters nor FLOPs where their size follows from the width
    fixed = [a for a in AXES if a not in wish.shrinking and a != "num_attention_heads"]
    given = _listed([a for a in fixed if wish.given(a) is not None])
    kept = _listed([a for a in fixed if wish.given(a) is None], "or")
    ways = ["raise the budget"]
    ways += [f"leave out {given}"] if given else []
    ways += [f"name {kept} in target.budget.free"] if kept else []
    return ShapeError(
        f"no legal shape meets the budget: even the smallest ({smallest}) is over it",
        where=f"target.budget.{budget.kind}",
        got=str(budget),
        allowed=f"from {_used(budget, smallest, meter)}",
        hint=", or ".join(ways),
    )


def _neighbours(wish: Wish, shape: Shape, draft: Draft) -> list[Shape]:
    """Return the legal shapes one step of a grid away; illegal numbers of heads are refused.

    With a budget along its free axes, else along those that the wish names and the width.
    """
    meter = draft.meter
    axes = wish.shrinking or [
        a for a in AXES if wish.given(a) is not None or a == "hidden_size"
    ]  # fmt: skip
    found = []
    for axis in axes:
        value = getattr(shape, axis)
        values = grid(axis, shape, meter, follow=_follows(wish, meter))
        below, above = [v for v in values if v < value], [v for v in values if v > value]
        for other in below[-1:] + above[:1]:
            found.append(_changed(wish, shape, axis, other, draft))
        if axis == "num_attention_heads":
            heads = range(1, meter.top.num_attention_heads + 1)
            for tried in (
                replace(shape, num_attention_heads=h) for h in (value - 1, value + 1) if h in heads
            ):
                error = meter.why_illegal(tried)
                if error is not None:
                    draft.refuse(tried, error)
    return list(dict.fromkeys(found))


def _changed(wish: Wish, shape: Shape, axis: str, value: int, draft: Draft) -> Shape:
    """Return the shape with one other value; an MLP width that follows hidden_size follows."""
    other = changed(shape, axis, value, follow=_follows(wish, draft.meter))
    proportional = wish.intermediate_size is None and "intermediate_size" not in wish.shrinking
    if axis == "hidden_size" and proportional and wish.budget is None:
        share = value / draft.meter.top.hidden_size
        inner = draft.rounded(other, "intermediate_size", share, said=False)
        other = replace(other, intermediate_size=inner)
    return other


def _listed(names: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _limit(budget: Budget, meter: Meter) -> float:
    if isinstance(budget.value, float):
        return budget.value * meter.amount(budget.kind, meter.top)
    return budget.value


def _amount(budget: Budget, amount: float) -> str:
    return f"{amount:.3f}" if budget.kind == "latency_ratio" else f"{int(amount):,}"


def _used(budget: Budget, shape: Shape, meter: Meter) -> str:
    amount = meter.amount(budget.kind, shape)
    if budget.kind == "latency_ratio":
        return f"{amount:.3f} of the parent's latency"
    ratio = amount / meter.amount(budget.kind, meter.top)
    return f"{int(amount):,} {budget.kind} ({ratio:.3f} of the parent's)"
