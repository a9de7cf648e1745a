"""YAML 1.2 text → plain data that knows the line of every key.

The text is composed to nodes and built by hand: no tag runs code, a key given twice is a problem,
and a number is what YAML 1.2 calls one (`1e-3` too, which 1.1 reads as text).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from slimfuse.errors import RecipeError
from slimfuse.recipe.problems import InvalidRecipe, Loc, Place, Problem, show_value

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000  # after aliases are followed, so no bomb of anchors goes off
MAX_NODES = 2 * MAX_VALUES + 1  # of the text itself: each value may have a key
MAX_DEPTH = 32
MAX_INT = 2**63 - 1

_PREFIX = "tag:yaml.org,2002:"
_CORE_SCHEMA = (  # YAML 1.2.2, section 10.3.2
    ("null", re.compile(r"~|null|Null|NULL|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")),
    ("float", re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")),
)


class _CoreResolver(VersionedResolver):
    """Decides by the core schema, whatever a %YAML line says."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and implicit[0]:
            for name, pattern in _CORE_SCHEMA:
                if pattern.fullmatch(value):
                    return Tag(suffix=_PREFIX + name)
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)


class _TooMany(Exception):
    """A text with more values than any recipe has; `line` from 1."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line


class _CountingComposer(Composer):
    """Stops at too many nodes, of which a megabyte of text holds half a minute's work."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise _TooMany(self.parser.peek_event().start_mark.line + 1)
        return super().compose_node(parent, index)


class _Unreadable(Exception):
    """A scalar that is no value of its kind."""


@dataclass
class Tree:
    """Plain data under construction, and what its text said about places and mistakes."""

    data: Any = None
    places: dict[Loc, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unreadable: set[Loc] = field(default_factory=set)  # None stands there for want of a value

    def place(self, loc: Loc) -> Place:
        """Return the place of a value, or of the nearest value around it."""
        while loc not in self.places and loc:
            loc = loc[:-1]
        return self.places[loc]

    def below(self, key: str) -> Tree:
        """Return the mapping that stands at a key as a tree of its own; raises InvalidRecipe."""
        data = self.data.get(key) if isinstance(self.data, dict) else None
        if not isinstance(data, dict):
            raise InvalidRecipe([Problem(self.place((key,)), (key,), "is no mapping")])
        return Tree(
            data,
            {loc[1:]: place for loc, place in self.places.items() if loc[:1] == (key,)},
            [p if p.loc[:1] != (key,) else replace(p, loc=p.loc[1:]) for p in self.problems],
            {loc[1:] for loc in self.unreadable if loc[:1] == (key,)},
        )

    def forget(self, loc: Loc) -> None:
        """Drop what is known about a value that is about to be replaced."""
        self.places = {k: v for k, v in self.places.items() if k[: len(loc)] != loc}
        self.unreadable = {k for k in self.unreadable if k[: len(loc)] != loc}

    def read(self, text: str, loc: Loc, at: Callable[[int], Place]) -> Any:
        """Return the data of a YAML text that will stand at `loc`; `at` places its lines.

        Raises: InvalidRecipe where the text is no YAML, or too large or too deep.
        """
        builder = _Builder(self, at)
        value = builder.build(_compose(text, at), loc, at(1), depth=0)
        self.problems += builder.problems
        return value


def read_file(path: Path) -> Tree:
    """Return the tree of a recipe file. Raises: RecipeError where it is no YAML mapping."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        known = Path("recipes").is_dir()  # as in a clone of slimfuse
        hint = "slimfuse recipe list names the recipes that come along" if known else None
        where = str(Place(str(path)))
        raise RecipeError(f"recipe can't be read: {reason}", where=where, hint=hint) from error
    source = str(path)
    if len(raw) > MAX_BYTES:
        raise _failure(Place(source), "file too large", allowed=f"at most {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        what = f"not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise _failure(Place(source, line), what) from error
    tree = Tree()
    tree.data = tree.read(text, (), lambda line: Place(source, line))
    if () in tree.unreadable:
        raise InvalidRecipe(tree.problems)
    if tree.data is None:
        raise _failure(Place(source, 1), "empty recipe")
    if not isinstance(tree.data, dict):
        got = show_value(tree.data)
        raise _failure(tree.place(()), "recipe is no mapping", got=got, allowed="key: value lines")
    return tree


def _failure(place: Place, what: str, **facts: str) -> InvalidRecipe:
    return InvalidRecipe([Problem(place, (), what, **facts)])


def _too_many(place: Place) -> InvalidRecipe:
    allowed = f"{MAX_VALUES} values, {MAX_DEPTH} levels, aliases included"
    return _failure(place, "too many or too deep values", allowed=allowed)


def _compose(text: str, at: Callable[[int], Place]) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Composer = _CoreResolver, _CountingComposer
    yaml.max_depth = MAX_DEPTH
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ruamel's about anchors given twice: later ones win
            node: Node | None = yaml.compose(text)
    except _TooMany as error:
        raise _too_many(at(error.line)) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(str(error.problem or error.context).split("\n")[0].split())
        what = what.partition(", if necessary")[0]  # advice to programmers about the depth
        raise _failure(at(mark.line + 1 if mark else 1), f"not valid YAML: {what}") from error
    except YAMLError as error:  # the reader's: a character that YAML does not allow
        position = getattr(error, "position", 0)
        line = text[: position if isinstance(position, int) else 0].count("\n") + 1
        reason = getattr(error, "reason", None) or str(error).split("\n")[0]
        raise _failure(at(line), f"not valid YAML: {reason}") from error
    except Exception as error:  # odd texts reach faults of the parser: still the text's mistake
        raise _failure(at(1), f"not valid YAML: {type(error).__name__} in the parser") from error
    return node


@dataclass
class _Builder:
    """Builds one text's nodes; keeps the count that stops a bomb."""

    tree: Tree
    at: Callable[[int], Place]
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def build(self, node: Node | None, loc: Loc, place: Place, depth: int) -> Any:
        """Return the node's data, with every place below it noted in the tree."""
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise _too_many(place)
        self.tree.places[loc] = place
        if node is None:
            return None
        kind = (node.tag or "").removeprefix(_PREFIX)
        if isinstance(node, MappingNode) and kind == "map":
            return self._mapping(node, loc, depth)
        if isinstance(node, SequenceNode) and kind == "seq":
            return [
                self.build(item, (*loc, i), self.at(item.start_mark.line + 1), depth + 1)
                for i, item in enumerate(node.value)
            ]
        try:
            if not isinstance(node, ScalarNode):
                raise _Unreadable(f"tag {node.tag!r} is not read")
            return _scalar(kind, node.value)
        except _Unreadable as error:
            self.problems.append(Problem(place, loc, str(error)))
            self.tree.unreadable.add(loc)
            return None

    def _mapping(self, node: MappingNode, loc: Loc, depth: int) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.at(key_node.start_mark.line + 1)
            if not isinstance(key_node, ScalarNode):
                self.problems.append(Problem(place, loc, "a key must be text, not a list or map"))
                continue
            key = key_node.value.encode("utf-8", "backslashreplace").decode()
            here = (*loc, key)
            if key in data:
                first = self.tree.places[here]
                self.problems.append(Problem(place, here, f"key given twice, first at {first}"))
                continue
            data[key] = None  # known from here on, also while its own value is built
            data[key] = self.build(value_node, here, place, depth + 1)
        return data


def _scalar(kind: str, text: str) -> Any:
    """Return a scalar's value by the name of its tag."""
    if kind == "str":
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")  # joins JSON's pairs
        except UnicodeDecodeError as error:
            raise _Unreadable("text with half a surrogate pair") from error
    if kind == "null":
        return None
    if kind not in ("bool", "int", "float"):
        raise _Unreadable(f"tag {kind!r} is not read")
    patterns = [p for name, p in _CORE_SCHEMA if name == kind or (kind, name) == ("float", "int")]
    if not any(pattern.fullmatch(text) for pattern in patterns):
        raise _Unreadable(f"{show_value(text)} is no {kind}")  # after !!int and the like
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        base = 10 if not text.startswith("0") else {"o": 8, "x": 16}.get(text[1:2], 10)
        value = int(text, base) if len(text) <= 64 else MAX_INT + 1
        if abs(value) > MAX_INT:
            raise _Unreadable("integer too large")
        return value
    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise _Unreadable(f"{show_value(text)} is not a finite number")
    return number
