"""What is wrong with a recipe, and where: one line per problem, all lines in one error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from slimfuse.errors import RecipeError

Loc = tuple[str | int, ...]
"""The way to a value from the top of the recipe: keys of mappings, indices of lists."""

SHOWN_PROBLEMS = 50
SHOWN_CHARACTERS = 80  # of a value or a key
SHOWN_OF_PART = 600  # of any part of a problem: what a user wrote may have any length
SHOWN_IN_ALL = 3_000


class Place(NamedTuple):
    """Where a value was written: a line (from 1) of a file, or an override."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        source = one_line(self.source)
        return source if self.line is None else f"{source}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing to mend; `str` gives `place: key: what; did you mean …? got: …; allowed: …`."""

    place: Place
    loc: Loc
    what: str
    meant: str | None = None
    got: str | None = None
    allowed: str | None = None

    def __str__(self) -> str:
        key = f"{one_line(show_loc(self.loc))}: " if self.loc else ""
        head = f"{self.place}: {key}{one_line(self.what)}"
        facts = (("got", self.got), ("allowed", self.allowed))
        tail = [f"{name}: {one_line(text)}" for name, text in facts if text is not None]
        if self.meant is not None:
            return " ".join([f"{head}; did you mean {self.meant!r}?", "; ".join(tail)]).rstrip()
        return "; ".join([head, *tail])


class InvalidRecipe(RecipeError):
    """A recipe with every problem found in it; where, got and allowed are those of the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems
        first = self.problems[0]
        lines: list[str] = []
        for problem in self.problems[:SHOWN_PROBLEMS]:
            line = str(problem)
            if lines and sum(map(len, lines)) + len(line) > SHOWN_IN_ALL:
                break
            lines.append(line)
        if more := len(self.problems) - len(lines):
            lines.append(f"and {more} problem{'s' * (more > 1)} more")
        super().__init__(
            "\n".join(lines), where=str(first.place), got=first.got, allowed=first.allowed
        )

    def __str__(self) -> str:
        return self.what  # each line already carries its own place, got and allowed


def nearest(word: str, known: Sequence[str]) -> str | None:
    """Return the known word that is meant by a misspelt one, or None."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def show_loc(loc: Loc) -> str:
    """Return `parents[0].train` for ("parents", 0, "train")."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            plain = part.isprintable() and 0 < len(part) <= SHOWN_CHARACTERS
            text += ("." if text else "") + (part if plain else _cut(ascii(part)))
    return text


def show_value(value: object) -> str:
    """Return a value as a recipe would write it, cut to one short line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return _cut(repr(value) if isinstance(value, str) else str(value))


def one_line(text: str) -> str:
    """Return a text as one printable line of bounded length: its head and its tail say most."""
    if len(text) > SHOWN_OF_PART:
        text = f"{text[: SHOWN_OF_PART // 2]}…{text[1 - SHOWN_OF_PART // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
