"""Softness by effective units: the regulariser whose plan mixes as many units as asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from slimfuse.transport.entropic import Found, Potentials
from slimfuse.transport.maps import from_plan

UNITS_TOLERANCE = 1e-3  # relative: effective units are hit to 0.1 %
FIRST_REG = 1.0
FACTOR = 4.0  # between regularisers while bracketing
SMALLEST_REG, LARGEST_REG = 1e-4, 1e4
STEPS = 40

Soft = Callable[[float, bool, Potentials | None], Found]  # (reg, rough, start) -> plan


def perplexity(plan: Tensor) -> float:
    """Return the effective units of a plan (n, m) over its own sums."""
    return from_plan(plan).effective_units


def softest_units(mu: Tensor) -> float:
    """Return exp H(μ), the effective units of the independent coupling: n for uniform masses."""
    return math.exp(float(-torch.special.xlogy(mu, mu).sum()))


def at_units(wanted: float, soft: Soft, hardest: Found | None, softest: float) -> Found:
    """Return the plan with `wanted` effective units, to a relative `UNITS_TOLERANCE`.

    soft: solves for a regulariser in units of the mean cost; hardest: the exact plan, where the
    kind has one. The regulariser is bracketed on a geometric grid from above, every solve started
    from the last one's potentials, then found in log reg by false position with bisection as the
    safeguard. Raises ValueError where no regulariser gives that many.
    """
    lowest = 1.0 if hardest is None else perplexity(hardest.plan)
    slack = 1 + UNITS_TOLERANCE
    if not lowest / slack <= wanted <= softest * slack:
        raise ValueError(
            f"effective_units={wanted:g} is out of reach: plans of this cost mix between "
            f"{lowest:.4g} (the hardest) and {softest:.4g} (the softest) source units per target"
        )
    if hardest is not None and wanted <= lowest * slack:
        return hardest

    start: Potentials | None = None

    def gap(reg: float) -> float:
        nonlocal start
        found = soft(reg, True, start)
        start = found.potentials
        return math.log(perplexity(found.plan) / wanted)

    def result(reg: float) -> Found:
        return soft(reg, False, start)

    close = UNITS_TOLERANCE / 2  # room for what the looser tolerance hides
    high = low = FIRST_REG
    above = below = gap(FIRST_REG)
    while below > close and low > SMALLEST_REG:
        high, above, low = low, below, low / FACTOR
        below = gap(low)
    while above < -close and high < LARGEST_REG:
        low, below, high = high, above, high * FACTOR
        above = gap(high)
    for reg, distance in ((low, below), (high, above)):
        if abs(distance) <= close:
            return result(reg)
    if below > 0 or above < 0:
        reached, reg = (below, low) if below > 0 else (above, high)
        raise ValueError(
            f"effective_units={wanted:g} is out of reach: the plan still mixes "
            f"{wanted * math.exp(reached):.4g} at reg={reg:.1g}; tied costs stay mixed at any reg"
        )
    a, b = math.log(low), math.log(high)
    for step in range(STEPS):
        share = below / (below - above)
        # false position can creep along one side: every third step bisects
        middle = (a + b) / 2 if step % 3 == 2 else a + share * (b - a)
        distance = gap(math.exp(middle))
        if abs(distance) <= close:
            break
        if distance < 0:
            a, below = middle, distance
        else:
            b, above = middle, distance
    return result(math.exp(middle))
