"""Overrides from the command line: `a.b.c=value`, the value read as YAML."""

from __future__ import annotations

import re
from typing import Any

from slimfuse.recipe.problems import InvalidRecipe, Loc, Place, Problem, show_value
from slimfuse.recipe.tree import Tree


def apply_override(tree: Tree, override: str) -> None:
    """Set one value of the tree; what can't be set becomes a problem of the tree.

    override: keys parted by dots, a list's index by number (`parents.0.weight=2` or
        `parents[0].weight=2`). A missing mapping on the way is made.
    """
    shown = override.encode("utf-8", "backslashreplace").decode()
    place = Place(f"--set {shown}")
    keys, equals, text = override.partition("=")
    parts = re.sub(r"\[([0-9]+)\]", r".\1", keys.strip()).split(".")
    if not equals or not all(parts):
        allowed = "key.key=value, as in finetune.lr=1e-3"
        tree.problems.append(Problem(place, (), "not an override", allowed=allowed))
        return
    scratch = Tree()
    try:
        value = scratch.read(text, (), lambda _line: place)
    except InvalidRecipe as error:
        tree.problems += error.problems
        return
    loc = _set(tree, parts, value, place)
    if loc is None:
        return
    tree.forget(loc)
    tree.places |= {loc + below: place for below in scratch.places}
    tree.unreadable |= {loc + below for below in scratch.unreadable}
    tree.problems += [
        Problem(place, loc + found.loc, found.what, got=found.got) for found in scratch.problems
    ]


def _set(tree: Tree, parts: list[str], value: Any, place: Place) -> Loc | None:
    """Set the value and return where it stands; None after noting why it can't."""
    spot, loc = tree.data, ()  # type: Any, Loc
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(spot, list):
            index = int(part) if re.fullmatch(r"[0-9]{1,6}", part) else len(spot)
            if index >= len(spot):
                allowed = f"an index from 0 to {len(spot) - 1}" if spot else "a whole list"
                problem = Problem(place, loc, "no such item", got=show_value(part), allowed=allowed)
                tree.problems.append(problem)
                return None
            key: str | int = index
        elif isinstance(spot, dict):
            key = part
        else:
            got = show_value(spot)
            tree.problems.append(Problem(place, loc, "has no keys of its own", got=got))
            return None
        loc = (*loc, key)
        if last:
            spot[key] = value
        else:
            child = spot.get(key) if isinstance(spot, dict) else spot[key]
            if child is None:
                child = spot[key] = {}
                tree.forget(loc)
                tree.places[loc] = place
            spot = child
    return loc
