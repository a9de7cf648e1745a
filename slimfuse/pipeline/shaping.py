"""From a recipe's sizes and budgets to configs: the target's and those of parents to be trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimfuse.families import Family, Shape
from slimfuse.pipeline.common import Opened
from slimfuse.pipeline.labelling import labelled
from slimfuse.recipe import Recipe, Target, Train, TrainConfig
from slimfuse.shapes import Budget, Proposal, Wish, resolve


def propose_shape(
    recipe: Recipe, configs: Mapping[str, Any], family: Family, opened: Opened
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
    with Timer(recipe, largest, family, opened.example) as timer:
        return resolve(wish, largest, family, time_ratio=timer)


def pinned(recipe: Recipe, shape: Shape) -> Recipe:
    """Return the recipe with a shape that was found before in place of its wishes."""
    return recipe.model_copy(update={"target": Target(**asdict(shape))})


def largest_config(configs: Mapping[str, Any], family: Family) -> Any:
    """Return the widest parent's config with the depth, and kinds of blocks, of the deepest."""
    largest = copy.deepcopy(max(configs.values(), key=lambda c: family.shape(c).hidden_size))
    deepest = max(configs.values(), key=lambda c: family.shape(c).num_hidden_layers)
    largest.num_hidden_layers = family.shape(deepest).num_hidden_layers
    if getattr(deepest, "layer_types", None):
        largest.layer_types = list(deepest.layer_types)
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


def shape_of(spec: TrainConfig) -> Shape:
    """Return the shape of a model that the run trains."""
    return Shape(
        spec.hidden_size, spec.num_attention_heads, spec.intermediate_size, spec.num_hidden_layers
    )


def trained_config(
    family: Family, train: Train, opened: Opened, start: Path | None, where: str
) -> Any:
    """Return the config of a model that the run trains, from scratch or from the model in `start`.

    Raises ShapeError where it isn't legal.
    """
    labels = train.classes or opened.data.classes
    if start is None:
        assert train.config is not None
        return opened.new_config(family, train.config, labels, where)
    return labelled(family.load_config(str(start)), labels)
