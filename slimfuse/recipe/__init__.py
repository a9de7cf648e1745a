"""Recipes: YAML read strictly into frozen models, every problem with its line at once.

Imports no torch, so that `slimfuse recipe check` answers at once.
"""

from __future__ import annotations

from slimfuse.recipe.inputs import Calibration, Data, Limit, Parent, Train, TrainConfig
from slimfuse.recipe.loading import (
    Located,
    RecipeInfo,
    find_recipes,
    load_located,
    load_recipe,
    recipe_schema,
)
from slimfuse.recipe.models import (
    Bench,
    Distill,
    Export,
    Finetune,
    Fuse,
    Gate,
    Ot,
    Quantize,
    Recipe,
    Runtime,
    Target,
)
from slimfuse.recipe.problems import InvalidRecipe, Problem

__all__ = [
    "Bench",
    "Calibration",
    "Data",
    "Distill",
    "Export",
    "Finetune",
    "Fuse",
    "Gate",
    "InvalidRecipe",
    "Limit",
    "Located",
    "Ot",
    "Parent",
    "Problem",
    "Quantize",
    "Recipe",
    "RecipeInfo",
    "Runtime",
    "Target",
    "Train",
    "TrainConfig",
    "find_recipes",
    "load_located",
    "load_recipe",
    "recipe_schema",
]
