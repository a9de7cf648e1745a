"""Names beside points so that no two names overlap and none covers a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

Box = tuple[float, float, float, float]
"""left, bottom, right, top, in points."""

_DIRECTIONS = (  # in the order a reader prefers: right, then above, then around
    (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1),
)  # fmt: skip
_RADII = (7.0, 13.0, 22.0, 34.0, 50.0, 70.0)


@dataclass(frozen=True)
class Placed:
    """A label's box, and how far it had to go from its point."""

    box: Box
    radius: float

    @property
    def needs_leader(self) -> bool:
        """Whether the label stands so far off that a line must tie it to its point."""
        return self.radius > _RADII[1]


def overlap(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    frame: Box,
) -> list[Placed]:
    """Return one box per point, greedily: least overlap first, then none that reads as another
    point's name, then nearest, then preferred side.

    points, sizes: centre of each mark, width and height of its label, in points.
    obstacles: boxes no label may cover: marks, error bars.
    """
    taken = list(obstacles)
    out = []
    for point, size in zip(points, sizes, strict=True):
        choices = [
            Placed(_into(_beside(point, size, direction, radius), frame), radius)
            for radius, direction in product(_RADII, _DIRECTIONS)
        ]
        # min keeps the first of equals: nearest and most preferred
        ranks = [(_cost(c.box, taken, frame), _strayed(c.box, point, points)) for c in choices]
        choice = choices[ranks.index(min(ranks))]
        out.append(choice)
        taken.append(choice.box)
    return out


def _beside(
    point: tuple[float, float], size: tuple[float, float], direction: tuple[int, int], radius: float
) -> Box:
    (x, y), (width, height), (dx, dy) = point, size, direction
    reach = radius / math.hypot(dx, dy)
    left = x + dx * reach + (dx - 1) * width / 2
    bottom = y + dy * reach + (dy - 1) * height / 2
    return left, bottom, left + width, bottom + height


def _into(box: Box, frame: Box) -> Box:
    # sideways only: a name above its point still reads as its name when it is not centred
    shift = max(frame[0] - box[0], 0.0) + min(frame[2] - box[2], 0.0)
    return box[0] + shift, box[1], box[2] + shift, box[3]


def _strayed(box: Box, own: tuple[float, float], points: Sequence[tuple[float, float]]) -> bool:
    """Return whether a label is nearer to another point than to its own."""
    return any(_gap(box, other) < _gap(box, own) for other in points)


def _gap(box: Box, point: tuple[float, float]) -> float:
    x, y = point
    return math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    outside = area - overlap(box, frame)
    covered = sum(overlap(box, other) for other in taken)
    return round(4 * outside + covered, 3)
