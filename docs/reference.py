"""Write docs/recipes-reference.md from the recipe's schema: `python docs/reference.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from slimfuse.recipe import NetRecipe, Recipe
from slimfuse.recipe.explain import describe

PAGE = Path(__file__).with_name("recipes-reference.md")
HEAD = """# Every key of a recipe

Written by `make docs` from the schema that recipes are checked with; `slimfuse recipe schema` \
prints it for editors, `slimfuse recipe show RECIPE` a recipe with every default filled in. \
Unknown keys are errors. **must**: the key has no default.

"""


def page() -> str:
    """Return the whole page."""
    parts, seen = [HEAD], dict[str, str]()
    for title, recipe in (
        ("Recipes", Recipe),
        ("Recipes of plain nets (`family: auto`)", NetRecipe),
    ):
        schema = recipe.model_json_schema(by_alias=True, mode="validation")
        parts.append(f"## {title}\n\n{(recipe.__doc__ or '').splitlines()[0]}\n\n")
        parts += _tables(recipe, schema, schema, "", seen)
    return "".join(parts).rstrip() + "\n"


def _tables(
    model: type[BaseModel], part: dict[str, Any], schema: dict[str, Any], path: str,
    seen: dict[str, str],
) -> list[str]:  # fmt: skip
    """Return a model's table, then those of its parts, each the first time that it comes."""
    rows = ["| key | is | default | |\n| --- | --- | --- | --- |\n"]
    below: list[str] = []
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for key, told in part["properties"].items():
        inner = _inner(told, schema)
        place = f"{path}{key}" + ("[]" if _is_list(told) else "")
        name = inner.rpartition("/")[2] if inner else ""
        kind = f"keys of {seen.get(name, place)}" if inner else describe(schema, told)
        if "text like" in kind:
            kind = f"`{kind}`"
        default = _default(fields[key])
        text = told.get("description", fields[key].description or "")
        rows.append(f"| `{key}` | {_cell(kind)} | {default} | {_cell(text)} |\n")
        if inner and name not in seen:
            seen[name] = place
            owner = _model(fields[key].annotation, name)
            head = f"### {place}\n\n{_cell((owner.__doc__ or '').splitlines()[0])}\n\n"
            below.append(head)
            below += _tables(owner, schema["$defs"][name], schema, f"{place}.", seen)
    return ["".join(rows) + "\n", *below]


def _inner(told: dict[str, Any], schema: dict[str, Any]) -> str | None:
    """Return the reference to a model that a key holds, in a list or not."""
    for option in (told, *told.get("anyOf", ()), *told.get("allOf", ())):
        ref = option.get("$ref") or option.get("items", {}).get("$ref")
        if ref and "properties" in schema["$defs"][ref.rpartition("/")[2]]:
            return str(ref)
    return None


def _is_list(told: dict[str, Any]) -> bool:
    return any("items" in option for option in (told, *told.get("anyOf", ())))


def _model(annotation: Any, name: str) -> type[BaseModel]:
    """Return the model of a name somewhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        assert annotation.__name__ == name
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        try:
            return _model(argument, name)
        except LookupError:
            continue
    raise LookupError(name)


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "**must**"
    value = field.default
    if isinstance(value, BaseModel):
        return "its own"
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if text.startswith("`") else text.replace("[", "\\[")


if __name__ == "__main__":
    PAGE.write_text(page())
