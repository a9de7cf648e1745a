"""What an error must say."""

from __future__ import annotations

from typing import Any

from tiny_run import recipe

Words = tuple[str, ...]


def says(text: str, words: Words) -> None:
    """Check that an error holds every word."""
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in:\n{text}"


def two(first: str = "slim", second: str = "other") -> dict[str, Any]:
    """Return a recipe that fuses two saved parents."""
    return recipe(parents=[{"name": "a", "from": first}, {"name": "b", "from": second}])
