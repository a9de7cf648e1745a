"""English prose without labels: An Anarchist FAQ, from the Debian package `anarchism`.

Copyright 1995-2017 The Anarchist FAQ Editorial Collective, GPL version 2 (the package's `copyright`
file). It serves as a long English text; nothing here depends on what it says.
"""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

from slimfuse.data import cache, debian
from slimfuse.data.base import Split, TextData, no_labels
from slimfuse.data.texts import text_data
from slimfuse.errors import DataError

SHA256 = "8c397c4f224a549e12f95e62ad2ac44b6664e978e608275a52efec0b592b39a8"
TITLE = "An Anarchist FAQ"
PACKAGE = "anarchism"
SYSTEM = Path("/usr/share/doc/anarchism/html")
ENDS = ("secA1.html", "secJ7.html")
CHAPTER = re.compile(r"sec([A-J])(int|\d+|con)\.html")
TEST_EVERY = 20
BLOCKS = {
    "blockquote", "br", "div", "h1", "h2", "h3", "h4", "hr", "li", "ol", "p", "table", "td", "tr",
    "ul",
}  # fmt: skip
HIDDEN = {"title", "script", "style"}


def cache_folder() -> Path:
    """Return the per-user folder the package is unpacked into when it isn't installed."""
    return cache.cache_folder("anarchism")


def load_anarchism(path: str | None = None) -> TextData:
    """Return the paragraphs of 97 chapters, in order: every 20th chapter is for testing.

    About 7.5 million characters. No test paragraph stands in a training chapter, too. Looks in
    `path`, else in the installed package's folder, else unpacks the package (no root needed) into
    the user's cache. Raises DataError when a file is missing or altered.
    """
    folder = Path(path) if path else _find()
    digest, chapters = hashlib.sha256(), []
    found = [file for file in folder.glob("sec*.html") if CHAPTER.fullmatch(file.name)]
    for file in sorted(found, key=_place):
        content = file.read_bytes()
        digest.update(b"%b %d\n%b" % (file.name.encode(), len(content), content))
        chapters.append(_paragraphs(content.decode("utf-8")))
    if digest.hexdigest() != SHA256:
        raise DataError(
            f"the chapters of {TITLE} are missing or not the published ones",
            where=str(folder),
            got=f"{len(chapters)} chapters, sha256 {digest.hexdigest()[:12]}…",
            allowed=f"97 chapters, sha256 {SHA256[:12]}…",
            hint=f"version 15.3 of the Debian package {PACKAGE}",
        )
    train = [p for i, chapter in enumerate(chapters) if (i + 1) % TEST_EVERY for p in chapter]
    known = set(train)
    test = [
        p
        for i, chapter in enumerate(chapters)
        if not (i + 1) % TEST_EVERY
        for p in chapter
        if p not in known
    ]
    train_split, test_split = (Split(texts, no_labels(len(texts))) for texts in (train, test))
    return text_data("anarchism", train_split, test_split, (), "none")


def _find() -> Path:
    return debian.find_files(TITLE, ENDS, package=PACKAGE, system=SYSTEM, cache=cache_folder())


def _place(file: Path) -> tuple[str, int]:
    """Return what sorts chapters: introduction, numbers, conclusion of each section."""
    match = CHAPTER.fullmatch(file.name)
    assert match is not None
    number = {"int": 0, "con": 1000}.get(match[2])
    return match[1], int(match[2]) if number is None else number


class _Reader(HTMLParser):
    """Collects the words of a page, a line break at each edge of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in HIDDEN
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data.replace("\n", " "))


def _paragraphs(page: str) -> list[str]:
    """Return the paragraphs, headings and list items of a page, one space between words."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    lines = (" ".join(line.split()) for line in "".join(reader.parts).split("\n"))
    return [line for line in lines if line]
