"""From a recipe's sizes and budgets to configs: the target's and those of parents to be trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from slimfuse.data import ImageData
from slimfuse.errors import ShapeError
from slimfuse.families import Family, Shape
from slimfuse.recipe import Recipe, Target, Train
from slimfuse.shapes import Budget, Proposal, Wish, resolve


def propose_shape(
    recipe: Recipe, configs: Mapping[str, Any], family: Family, processor: Any
) -> Proposal:
    """Return the planner's proposal for the target; raises ShapeError.

    Ratios are of the largest parent: the widest, with the depth of the deepest. A latency budget
    exports and times candidates of random weights.
    """
    from slimfuse.pipeline.timing import Timer

    largest = largest_config(configs, family)
    wish = wish_of(recipe.target)
    if wish.budget is None or wish.budget.kind != "latency_ratio":
        return resolve(wish, largest, family)
    with Timer(recipe, largest, family, processor) as timer:
        return resolve(wish, largest, family, time_ratio=timer)


def pinned(recipe: Recipe, shape: Shape) -> Recipe:
    """Return the recipe with a shape that was found before in place of its wishes."""
    return recipe.model_copy(update={"target": Target(**asdict(shape))})


def largest_config(configs: Mapping[str, Any], family: Family) -> Any:
    """Return the widest parent's config with the depth of the deepest."""
    largest = copy.deepcopy(max(configs.values(), key=lambda c: family.shape(c).hidden_size))
    largest.num_hidden_layers = max(family.shape(c).num_hidden_layers for c in configs.values())
    return largest


def wish_of(target: Target) -> Wish:
    """Return what the planner is asked for."""
    budget, free = None, Wish().free
    if target.budget is not None:
        free = target.budget.free
        for kind in ("params", "flops", "latency_ratio"):
            value = getattr(target.budget, kind)
            if value is not None:
                budget = Budget(kind, value)
    return Wish(
        target.hidden_size, target.num_attention_heads, target.intermediate_size,
        target.num_hidden_layers, budget, free,
    )  # fmt: skip


def trained_config(family: Family, train: Train, data: ImageData, size: int, where: str) -> Any:
    """Return the config of a model that the run trains; raises ShapeError for a bad patch."""
    shape = train.config
    if size % shape.patch_size:
        raise ShapeError(
            "patch_size must divide the image size",
            where=f"{where}.config.patch_size",
            got=f"{shape.patch_size} for images of {size} pixels",
            allowed=", ".join(str(d) for d in range(1, size + 1) if size % d == 0),
        )
    return family.new_config(
        Shape(
            shape.hidden_size, shape.num_attention_heads, shape.intermediate_size,
            shape.num_hidden_layers,
        ),
        patch_size=shape.patch_size, image_size=size, labels=train.classes or data.classes,
    )  # fmt: skip
