"""Legs: what each axis of each parameter carries, in a tiny pattern language.

A pattern has one item per axis: `^space` writes the space's units, `_space` reads them, `=space`
is fixed; parentheses hold the parts of a flattened axis, outermost first:
`(^head.3 _qk.3) _resid` is a key projection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Kind = Literal["stream", "head", "qk", "vo", "mlp", "fixed"]


class Role(Enum):
    """What an axis does with the units of its space."""

    WRITE = "^"
    READ = "_"
    FIXED = "="


@dataclass(frozen=True)
class Leg:
    """One space on one axis (or on one part of a flattened axis)."""

    space: str
    role: Role


@dataclass(frozen=True)
class Space:
    """A named axis that several tensors share; `size` is its number of units."""

    name: str
    size: int
    kind: Kind


Axis = tuple[Leg, ...]

_ITEM = re.compile(r"\(([^()]*)\)|(\S+)")
_LEG = re.compile(r"([\^_=])([A-Za-z][\w.]*)")


def parse(pattern: str) -> tuple[Axis, ...]:
    """Return the axes of a pattern; raises ValueError naming the part that is malformed."""
    axes = []
    for match in _ITEM.finditer(pattern):
        words = match[1].split() if match[1] is not None else [match[2]]
        legs = []
        for word in words:
            leg = _LEG.fullmatch(word)
            if leg is None:
                raise ValueError(
                    f"malformed leg {word!r} in {pattern!r}: want ^name, _name or =name"
                )
            legs.append(Leg(leg[2], Role(leg[1])))
        if not legs:
            raise ValueError(f"empty axis in {pattern!r}")
        axes.append(tuple(legs))
    return tuple(axes)
