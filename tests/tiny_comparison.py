"""Recipes that the tests of `compare` share."""

from __future__ import annotations

from typing import Any

from tiny_run import TRAIN, recipe

from slimfuse.recipe import Recipe

ALONE = [{"name": "a", "train": {**TRAIN, "seed": 0}}]


def made(**changes: Any) -> Recipe:
    return Recipe.model_validate(recipe(**changes))
