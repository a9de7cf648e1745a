"""Recipes: YAML read strictly into frozen models, every problem with its line at once.

Imports no torch, so that `slimfuse recipe check` answers at once.
"""

from __future__ import annotations

from slimfuse.recipe.finetuning import Distill, Finetune, Protect, Validation
from slimfuse.recipe.fusing import Anchor, Budget, Fuse, Method, Ot, Plans, Target
from slimfuse.recipe.inputs import (
    Calibration,
    Data,
    Limit,
    MeasuredPart,
    Parent,
    Train,
    TrainConfig,
    Training,
)
from slimfuse.recipe.loading import (
    AnyRecipe,
    Located,
    RecipeInfo,
    find_recipes,
    load_located,
    load_locked,
    load_recipe,
    recipe_schema,
)
from slimfuse.recipe.models import (
    Bench,
    Export,
    Gate,
    Quantize,
    Recipe,
    Runtime,
)
from slimfuse.recipe.nets import (
    NetAnchor,
    NetConfig,
    NetFuse,
    NetMethod,
    NetParent,
    NetRecipe,
    NetTrain,
    Pruned,
)
from slimfuse.recipe.problems import InvalidRecipe, Problem
from slimfuse.recipe.sparsifying import Sparsify

__all__ = [
    "Anchor",
    "AnyRecipe",
    "Bench",
    "Budget",
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
    "MeasuredPart",
    "Method",
    "NetAnchor",
    "NetConfig",
    "NetFuse",
    "NetMethod",
    "NetParent",
    "NetRecipe",
    "NetTrain",
    "Ot",
    "Parent",
    "Plans",
    "Problem",
    "Protect",
    "Pruned",
    "Quantize",
    "Recipe",
    "RecipeInfo",
    "Runtime",
    "Sparsify",
    "Target",
    "Train",
    "TrainConfig",
    "Training",
    "Validation",
    "find_recipes",
    "load_located",
    "load_locked",
    "load_recipe",
    "recipe_schema",
]
