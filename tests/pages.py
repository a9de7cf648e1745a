"""The documentation as tests read it: its pages, their paragraphs, tables and fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parent.parent
README = HOME / "README.md"
PAGES = (README, *sorted((HOME / "docs").glob("*.md")))
FENCE = re.compile(r"^(`{3,})(\S*)[^\n]*\n(.*?)^\1$", re.M | re.S)


@dataclass(frozen=True)
class Fenced:
    """A fenced block: its page, the line of its fence, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(HOME)}:{self.line}"


@dataclass(frozen=True)
class Passage:
    """A paragraph, an item of a list, a table's row, or a table's head."""

    page: Path
    line: int
    text: str
    sources: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(HOME)}:{self.line}"


def fenced(page: Path) -> list[Fenced]:
    """Return a page's fenced blocks in order."""
    text = page.read_text()
    return [
        Fenced(page, text.count("\n", 0, found.start()) + 1, found[2], found[3])
        for found in FENCE.finditer(text)
    ]


def links(text: str) -> list[str]:
    """Return the targets of a text's links and pictures, without their anchors."""
    prose = re.sub(r"`[^`\n]*`", "", text)
    return [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]


def passages(page: Path, text: str | None = None) -> Iterator[Passage]:
    """Yield a page's passages with the record files that each rests on.

    Those are the files of benchmarks/results and docs/decisions that it links, of a table's rows
    their own, or those of the paragraph before the table. text: the page's, where it isn't its
    file's.
    """
    text = page.read_text() if text is None else text
    text = FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    line, before = 1, ()
    for block in re.split(r"(\n\s*\n)", text):
        if block.startswith("|"):
            for i, row in enumerate(block.splitlines()):
                yield Passage(page, line + i, row, _records(page, row) or before)
        elif block.strip():
            start = line
            for part in re.split(r"\n(?=- |\d+\. )", block):
                before = _records(page, part)
                yield Passage(page, start, part, before)
                start += part.count("\n") + 1
        line += block.count("\n")


def _records(page: Path, text: str) -> tuple[Path, ...]:
    found = [(page.parent / link).resolve() for link in links(text) if "://" not in link]
    kept = (HOME / "benchmarks" / "results", HOME / "docs" / "decisions")
    return tuple(path for path in found if path.parent in kept and path.suffix == ".md")
