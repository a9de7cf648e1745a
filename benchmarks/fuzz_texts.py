"""Recipes broken as text: slips of the keyboard, odd bytes, and bombs."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"

SCRAPS = (
    "&a ", "*a", "<<: *a\n", "<<: {name: x}\n", "!!python/object:os.system ", "!!binary ", "!x ",
    "!!int ", "!!set ", "!!timestamp ", "2026-01-01", "2026-01-01T00:00:00Z", "\t", "\0", "\ufeff",
    "---\n", "...\n", "%YAML 1.1\n---\n", "%TAG ! x\n", ": ", "- ", "? ", "| \n", ">-\n", "#", "'",
    '"', "{", "}", "[", "]", ",", "\\", "\r", "\x85", "\u2028", "0o17", "0x1F", "1_000", "1:30",
    "yes", "on", "=", "@", "`", "é", "\U0001f600", "\x07", "name: a\n", "parents:\n", "  ", "\n",
)  # fmt: skip
"""Pieces of text that mean, or once meant, something to YAML."""


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(path.read_text() for path in sorted(RECIPES.rglob("*.yaml")))


def mistyped(chance: random.Random) -> bytes:
    """Return a shipped recipe with slips of the keyboard, cut, or in another encoding."""
    text = chance.choice(_texts())
    for _ in range(chance.choice((1, 1, 2, 5))):
        text = chance.choice(CUTS)(chance, text)
    if chance.random() < 0.1:
        return text.encode(chance.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")), "replace")
    return text.encode("utf-8", "surrogatepass")


def _scrap(chance: random.Random, text: str) -> str:
    i = chance.randrange(len(text) + 1)
    return text[:i] + chance.choice(SCRAPS) + text[i:]


def _without(chance: random.Random, text: str) -> str:
    i = chance.randrange(len(text) + 1)
    return text[:i] + text[i + chance.choice((1, 1, 2, 10, 100)) :]


def _line_again(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    return "".join([*lines, chance.choice(lines)])


def _line_moved(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    lines.insert(chance.randrange(len(lines)), lines.pop(chance.randrange(len(lines))))
    return "".join(lines)


def _indented(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    i = chance.randrange(len(lines))
    lines[i] = chance.choice((" ", "  ", "\t", "- ")) + lines[i]
    return "".join(lines)


def _cut_off(chance: random.Random, text: str) -> str:
    return text[: chance.randrange(len(text) + 1)]


Cut = Callable[[random.Random, str], str]
CUTS: tuple[Cut, ...] = (_scrap, _scrap, _without, _line_again, _line_moved, _indented, _cut_off)


def bytes_of(chance: random.Random) -> bytes:
    """Return bytes, or pieces that mean something to YAML, at random."""
    size = chance.choice((0, 1, 3, 20, 200, 2000))
    if chance.random() < 0.3:
        return chance.randbytes(size)
    return "".join(chance.choices(SCRAPS, k=min(size, 60))).encode("utf-8", "surrogatepass")


def bombed(chance: random.Random) -> bytes:
    """Return a text that costs far more than it weighs, or whose names are endless."""
    n = chance.choice((10, 40, 300, 3000))
    wide = min(n, 9)
    return chance.choice(
        (
            lambda: "a: " + "[" * n,
            lambda: "a: " + "[" * n + "]" * n,
            lambda: "".join(" " * i + "a:\n" for i in range(min(n, 400))),
            lambda: "a: &a [*a]\n",
            lambda: "a: &a {<<: *a}\n",
            lambda: "a: &a0 [x, x]\n"
            + "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * wide)}]\n" for i in range(1, 12)),
            lambda: "".join("a: &a 1\n" for _ in range(min(n, 300))),
            lambda: f"version: {'9' * n}\n",
            lambda: f"version: 1e{'9' * n}\n",
            lambda: f"version: 0x{'f' * n}\n",
            lambda: f"{'k' * n}: {'v' * n}\n",
            lambda: f"name: '{'é' * n}'\n",
            lambda: "\n".join(f"k{i}: {i}" for i in range(min(n, 300))),
            lambda: f"parents: [{', '.join(['{name: a, from: b}'] * min(n, 120))}]",
            lambda: f"parents: [{', '.join(f'{{name: x{i}}}' for i in range(40))}]",
            lambda: "\ufeff" * min(n, 40) + "version: 1\n",
            lambda: f"data: {{source: {'d' * n}, path: '{'p/' * n}'}}\n",
            lambda: "? " * min(n, 300) + "x",
            lambda: "- " * min(n, 300) + "x",
            lambda: "!!python/object/apply:os.system ['true']\n",
            lambda: f"a: !{'t' * n} x\n",
            lambda: f"a: *{'t' * n}\n",
        )
    )().encode()  # fmt: skip
