"""Do two measurements of the same models say the same?"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimfuse_export.errors import ExportError

WITHIN = 0.1
_NAMES = ("base", "other", "threads", "batch", "dims")


@dataclass(frozen=True)
class Agreement:
    """One ratio as measured twice.

    difference: of the larger from the smaller, as a share. noisy: one of the two had no verdict.
    """

    base: str
    other: str
    threads: int
    batch: int
    dims: str
    first: float
    second: float
    noisy: bool
    within: float = WITHIN

    @property
    def difference(self) -> float:
        """How far the two lie apart, 0.1 for 10 %."""
        return max(self.first, self.second) / min(self.first, self.second) - 1

    @property
    def agrees(self) -> bool:
        """Whether they lie no further apart than `within`."""
        return self.difference <= self.within


def compare_benches(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, within: float = WITHIN
) -> list[Agreement]:
    """Return every ratio that two files of `slimfuse-export bench --json` have in common.

    Raises: ExportError for a file that is none, and where they have no ratio in common.
    """
    one, two = (_ratios(Path(path)) for path in (first, second))
    both = [key for key in one if key in two]
    if not both:
        raise ExportError(
            "the two benches have no ratio in common",
            got="; ".join(sorted(" ".join(map(str, key)) for key in {*one, *two})),
            hint="time the same models at the same threads, batch and dims in both",
        )
    return [_agreement(one[key], two[key], within) for key in both]


def _agreement(one: dict[str, Any], two: dict[str, Any], within: float) -> Agreement:
    noisy = bool(one["noisy"] or two["noisy"])
    return Agreement(
        one["base"], one["other"], one["threads"], one["batch"], one.get("dims", ""),
        one["value"], two["value"], noisy, within,
    )  # fmt: skip


def _ratios(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    try:
        rows = json.loads(path.read_bytes())["ratios"]
        found = {tuple(row.get(name, "") for name in _NAMES): row for row in rows}
        if not all(row["value"] > 0 and "noisy" in row for row in rows):
            raise ValueError("a ratio without a value")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            "no file of slimfuse-export bench --json", where=path, got=type(error).__name__
        ) from error
    return found
