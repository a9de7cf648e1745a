"""Recipes that the tests of `compare` and of sweeps share."""

from __future__ import annotations

from typing import Any

from tiny_run import SHAPE, TRAIN, recipe

from slimfuse.recipe import Recipe

ALONE = [{"name": "a", "train": {**TRAIN, "seed": 0}}]
# of one block, for runs of many candidates
SHALLOW = {**TRAIN, "config": {**SHAPE, "num_hidden_layers": 1}}
SHALLOW_PAIR = [
    {"name": name, "train": {**SHALLOW, "shard": f"{i + 1}/2", "seed": i}}
    for i, name in enumerate("ab")
]
SHALLOW_ALONE = [{"name": "a", "train": {**SHALLOW, "seed": 0}}]


def made(**changes: Any) -> Recipe:
    return Recipe.model_validate(recipe(**changes))
