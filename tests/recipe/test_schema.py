"""The recipe's JSON schema describes every key."""

from __future__ import annotations

from typing import Any

from slimfuse.recipe import (
    recipe_schema,
)


def objects(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for item in schema for found in objects(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if "properties" in schema else []
    return own + objects(list(schema.values()))


def undescribed(schema: dict[str, Any]) -> list[str]:
    return [
        f"{part['title']}.{key}"
        for part in objects(schema)
        for key, value in part["properties"].items()
        if not value.get("description", "").endswith(".")
    ]


def test_the_schema_describes_every_key() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert undescribed(schema) == []
    parts = objects(schema)
    assert len(parts) == len(schema["$defs"]) == 36
    assert schema["oneOf"] == [{"$ref": "#/$defs/Recipe"}, {"$ref": "#/$defs/NetRecipe"}]
    assert all(part["additionalProperties"] is False and part["description"] for part in parts)
    needed = ["version", "name", "family", "task", "data", "parents"]
    assert schema["required"] == needed  # what both kinds need
    assert schema["$defs"]["Recipe"]["required"] == [*needed, "target"]
    assert schema["$defs"]["Parent"]["required"] == ["name"]
    assert schema["$defs"]["Parent"]["properties"]["from"]["description"].startswith("Local folder")


def test_the_schema_walk_sees_a_missing_description() -> None:
    schema = recipe_schema()
    del schema["$defs"]["Ot"]["properties"]["reg"]["description"]
    assert undescribed(schema) == ["Ot.reg"]
    assert undescribed(recipe_schema()) == []  # the change stayed in our copy
