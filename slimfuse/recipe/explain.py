"""What the schema allows at a place, and pydantic's errors in those words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import ErrorDetails

from slimfuse.recipe.problems import Loc, Problem, nearest, show_value
from slimfuse.recipe.strict import BY_SCHEMA, FINDING
from slimfuse.recipe.tree import Tree

Schema = dict[str, Any]

_WHAT = {
    "missing": "missing key",
    "extra_forbidden": "unknown key",
    "literal_error": "unknown value",
    "too_short": "too few items",
    "too_long": "too many items",
    "greater_than": "out of range",
    "greater_than_equal": "out of range",
    "less_than": "out of range",
    "less_than_equal": "out of range",
}


def explain(error: ErrorDetails, tree: Tree, schema: Schema) -> Problem:
    """Return one of pydantic's errors as a problem with place, suggestion and what is allowed."""
    kind, loc, value = error["type"], error["loc"], error["input"]
    place, part = tree.place(loc), fragment(schema, loc)
    what = _WHAT.get(kind, "wrong type" if kind.endswith("_type") else error["msg"])
    if kind == "extra_forbidden":
        known = sorted(fragment(schema, loc[:-1]).get("properties", ()))
        meant = nearest(str(loc[-1]), known)
        return Problem(place, loc, what, meant, allowed=", ".join(known))
    if kind == "missing":
        return Problem(place, loc, what, allowed=describe(schema, part))
    if kind == FINDING:
        context = error["ctx"]
        by_schema = context["allowed"] == BY_SCHEMA
        allowed = describe(schema, part) if by_schema else context["allowed"]
        silent = not by_schema and (value is None or isinstance(value, dict | list | tuple))
        got = None if silent else show_value(value)
        return Problem(place, loc, context["what"], context["meant"], got, allowed)
    known = list(choices(schema, part))
    meant = nearest(value, known) if known and isinstance(value, str) else None
    return Problem(place, loc, what, meant, show_value(value), describe(schema, part))


def fragment(schema: Schema, loc: Loc) -> Schema:
    """Return the part of the schema that rules the value at `loc`; empty where nothing does."""
    part = _solid(schema, schema)
    for key in loc:
        inner = part.get("items") if isinstance(key, int) else part.get("properties", {}).get(key)
        part = _solid(schema, inner or {})
    return part


def describe(schema: Schema, part: Schema) -> str:
    """Return in words which values a part of the schema allows."""
    if "$ref" in part:
        return describe(schema, schema["$defs"][part["$ref"].rpartition("/")[2]])
    if "anyOf" in part:
        return " or ".join(describe(schema, option) for option in part["anyOf"])
    if "enum" in part or "const" in part:
        return ", ".join(str(value) for value in part.get("enum", [part.get("const")]))
    match part.get("type"):
        case "object":
            return f"a mapping of {', '.join(sorted(part['properties']))}"
        case "array":
            least, most = part.get("minItems", 0), part.get("maxItems")
            count = f"{least} to {most}" if most else f"{least} or more"
            return f"a list of {count}, each {describe(schema, part['items'])}"
        case "string":
            return f"text like {part['pattern']}" if "pattern" in part else "text"
        case "null":
            return "null"
        case kind:
            return f"{kind}{_range(part)}"


def choices(schema: Schema, part: Schema) -> Iterator[str]:
    """Yield the words of an enumeration, null or not."""
    for option in (part, *part.get("anyOf", ())):
        yield from (str(value) for value in option.get("enum", ()))
        if "const" in option:
            yield str(option["const"])


def _solid(schema: Schema, part: Schema) -> Schema:
    """Follow a reference, and the one option that has parts: a nullable list, or a mapping."""
    if "$ref" in part:
        return _solid(schema, schema["$defs"][part["$ref"].rpartition("/")[2]])
    options = [_solid(schema, o) for o in part.get("anyOf", ()) if o.get("type") != "null"]
    parts = [option for option in options if "properties" in option]
    if len(options) == 1 and "items" in options[0]:
        parts = options
    return parts[0] if len(parts) == 1 else part


def _range(part: Schema) -> str:
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    texts = [f"{sign} {part[name]}" for name, sign in bounds.items() if name in part]
    return " " + " and ".join(texts) if texts else ""
