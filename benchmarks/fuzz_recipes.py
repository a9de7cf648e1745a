"""Recipes nobody would write: shipped ones mutated, made from the schema, broken texts, bombs.

Every example is a pure function of (seed, number), so a failure is found again at once.
`judge` says what `load_recipe` must do with one.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_texts import RECIPES, SCRAPS, bombed, bytes_of, mistyped
from ruamel.yaml import YAML

from slimfuse.errors import UserError
from slimfuse.recipe import load_recipe, recipe_schema

MOST_CHARACTERS = 4_000
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 1.5, 0.5, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf,
    2**31, 2**63 - 1, 2**63, -(2**70), 10**300, "", " ", "null", "~", "~bob/x", "a", "A", "1/2",
    "2/1", "../../etc", "/etc/passwd", "a/../b", "CON", "nul.txt", "a.", "a:b", "a\\b", "a\0b",
    "\n", "\r\n", "\x1b[31m", "\u2028", "\u202e", "é", "Ⅷ", "\U0001f600", "\ud800", "[red]x[/]",
    "x" * 300, "x" * 20_000, "é" * 5_000, [], {}, [[]], [{}], {"a": 1}, {"": ""}, [None],
    ["a", "a"], [1, 2], ["a", 1], [[[[[[1]]]]]],
)  # fmt: skip
"""Values that stand where others are meant."""


@dataclass(frozen=True)
class Example:
    """A recipe's bytes and the overrides it is read with. kind: how it was made."""

    kind: str
    content: bytes
    overrides: tuple[str, ...] = ()


def judge(one: Example, path: Path) -> str:
    """Return how `load_recipe` answers: "valid", or the first words of its refusal.

    path: a file that is overwritten. Raises AssertionError where a refusal is not one short, clear
    error; whatever else `load_recipe` raises is a fault of its own.
    """
    path.write_bytes(one.content)
    try:
        recipe = load_recipe(path, one.overrides)
    except UserError as error:
        text = str(error)
        text.encode()
        assert error.exit_code == 2 and error.what and error.where, "what is wrong, and where"
        assert 10 < len(text) <= MOST_CHARACTERS, f"{len(text)} characters"
        lines = text.split("\n")
        assert len(lines) <= 51 and all(lines), f"{len(lines)} lines"
        assert all(line.isprintable() for line in lines), "a terminal can show it"
        assert "Traceback" not in text and "pydantic" not in text
        return _kind_of(error)
    assert json.dumps(recipe.to_lock(), allow_nan=False), "a lock is written as JSON, too"
    return "valid"


def _kind_of(error: UserError) -> str:
    problems = getattr(error, "problems", ())
    what = problems[0].what if problems else error.what
    words = "".join(" " if c in "'\"" else c for c in what.partition(":")[0]).split()
    return "refused: " + " ".join(w for w in words[:4] if w.isascii() and w.strip(",").isalpha())


def example(seed: int, number: int) -> Example:
    """Return one example."""
    chance = random.Random(f"{seed}/{number}")
    kind, make = chance.choices(list(MAKERS.items()), weights=WEIGHTS)[0]
    content = make(chance)
    overrides = tuple(_override(chance) for _ in range(chance.choice((0, 0, 0, 0, 0, 1, 2))))
    return Example(kind, content, overrides)


@functools.cache
def shipped() -> tuple[dict[str, Any], ...]:
    """Return the shipped recipes as plain data."""
    yaml = YAML(typ="safe", pure=True)
    return tuple(yaml.load(path.read_text()) for path in sorted(RECIPES.rglob("*.yaml")))


@functools.cache
def _schema() -> dict[str, Any]:
    return recipe_schema()


@functools.cache
def _keys() -> tuple[str, ...]:
    """Return every key that a recipe may have anywhere."""
    found = {k for part in _schema()["$defs"].values() for k in part.get("properties", ())}
    return tuple(sorted(found))


@functools.cache
def _words() -> tuple[str, ...]:
    """Return every value of an enumeration anywhere in the schema."""

    def walk(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield from (str(v) for v in part.get("enum", ()))
            for inner in part.values():
                yield from walk(inner)
        elif isinstance(part, list):
            for inner in part:
                yield from walk(inner)

    return tuple(sorted(set(walk(_schema()))))


def flow(value: Any) -> str:
    """Return a value as YAML on one line; NaN and infinities as YAML spells them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' * (value < 0)}.inf"
    if isinstance(value, str) and value.isidentifier() and value.isascii():
        return value
    return json.dumps(value)


def _lines(value: dict[str, Any]) -> bytes:
    """Return a recipe with one top-level key a line."""
    return "".join(f"{flow(k)}: {flow(v)}\n" for k, v in value.items()).encode()


# --- shipped recipes, mutated as data ---


def _mutated(chance: random.Random) -> bytes:
    data: dict[str, Any] = copy.deepcopy(chance.choice(shipped()))
    for key in ("fuse", "finetune", "baselines", "export", "bench", "gates", "runtime"):
        if chance.random() < 0.5:  # smaller, and still whole
            data.pop(key, None)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        places = list(_places(data))
        if not places:
            break
        home, key = chance.choice(places)
        chance.choice(MUTATIONS)(chance, home, key)
    return _lines(data)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with each of its keys or indices."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _delete(_: random.Random, home: Any, key: Any) -> None:
    del home[key]


def _replace(chance: random.Random, home: Any, key: Any) -> None:
    home[key] = copy.deepcopy(chance.choice(ODD))


def _known_word(chance: random.Random, home: Any, key: Any) -> None:
    home[key] = chance.choice(_words())


def _scaled(chance: random.Random, home: Any, key: Any) -> None:
    value = home[key]
    if isinstance(value, int | float):
        home[key] = chance.choice(
            (-value, value * 2, value / 2, value + 1, float(value), str(value))
        )
    else:
        home[key] = [value, value]


def _renamed(chance: random.Random, home: Any, key: Any) -> None:
    if isinstance(home, dict) and isinstance(key, str):
        i = chance.randrange(len(key) + 1)
        new = chance.choice((key[:i] + key[i + 1 :], key.upper(), key + " ", "x" * 5000, key[::-1]))
        home[new] = home.pop(key)
    else:
        home.append(copy.deepcopy(home[key]))


def _added(chance: random.Random, home: Any, key: Any) -> None:
    value = copy.deepcopy(chance.choice(ODD))
    if isinstance(home, dict):
        home[chance.choice(_keys())] = value
    else:
        home.insert(chance.randrange(len(home) + 1), value)


def _moved(chance: random.Random, home: Any, key: Any) -> None:
    other, there = chance.choice(list(_places(chance.choice(shipped()))))
    home[key] = copy.deepcopy(other[there])


def _repeated(chance: random.Random, home: Any, key: Any) -> None:
    if isinstance(home, list):
        home.extend(copy.deepcopy([home[key]] * chance.choice((1, 8, 60))))
    elif isinstance(key, str):
        home[key] = {key: copy.deepcopy(home[key])}


Mutation = Callable[[random.Random, Any, Any], None]
MUTATIONS: tuple[Mutation, ...] = (
    _delete, _replace, _replace, _known_word, _scaled, _renamed, _added, _moved, _repeated,
)  # fmt: skip


# --- from the schema ---


BONES = ("version", "name", "family", "task", "data", "parents", "target")


def _from_schema(chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return _lines(_made(chance, chance.choice(_schema()["oneOf"]), depth=0))
    whole = chance.choice(shipped())  # what is needed from there, the rest made
    kind = "NetRecipe" if whole["family"] == "auto" else "Recipe"
    parts = _schema()["$defs"][kind]["properties"]
    value = {key: whole[key] for key in BONES if key in whole}
    for key in chance.sample(sorted(set(parts) - set(BONES)), chance.choice((1, 1, 2))):
        value[key] = _made(chance, parts[key], depth=1)
    return _lines(value)


def _made(chance: random.Random, part: dict[str, Any], depth: int) -> Any:
    """Return a value that a part of the schema allows, now and then one that it doesn't."""
    if "$ref" in part:
        return _made(chance, _schema()["$defs"][part["$ref"].rpartition("/")[2]], depth)
    if depth and chance.random() < 0.02:
        return copy.deepcopy(chance.choice(ODD))
    if "anyOf" in part:
        return _made(chance, chance.choice(part["anyOf"]), depth)
    if "enum" in part or "const" in part:
        return chance.choice(part.get("enum", [part.get("const")]))
    match part.get("type"):
        case "object":
            known, needed = part.get("properties", {}), part.get("required", ())
            share = 0.35 if depth < 2 else 0.25
            return {
                key: _made(chance, inner, depth + 1)
                for key, inner in known.items()
                if key in needed or chance.random() < share
            }
        case "array":
            least = part.get("minItems", 0)
            count = chance.randint(least, min(part.get("maxItems", least + 2), least + 2))
            return [_made(chance, part["items"], depth + 1) for _ in range(count)]
        case "string":
            return chance.choice(("a", "b", "x/y", "1/2", "2:4", "text"))
        case "integer":
            low = part.get("minimum", 0)
            return chance.choice((low, low + 1, min(low + 300, part.get("maximum", low + 300))))
        case "number":
            return chance.choice((0.5, 1, 1e-3, 0, part.get("maximum", 2)))
        case "boolean":
            return chance.random() < 0.5
    return None


MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "shipped, mutated": _mutated,
    "from the schema": _from_schema,
    "broken text": mistyped,
    "random bytes": bytes_of,
    "bombs": bombed,
}
WEIGHTS = (50, 20, 15, 12, 3)


def _override(chance: random.Random) -> str:
    known = (*_keys(), "0", "1", "", "x" * 3000)
    keys = chance.choices(known, k=chance.randint(1, 4))
    value = chance.choice((flow(chance.choice(ODD)), chance.choice(SCRAPS), "1", "pca", "vit"))
    return chance.choice((".".join(keys) + "=" + value, ".".join(keys), value, "=" + value))
