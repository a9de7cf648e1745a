"""Who takes part in a comparison: every method that fits the recipe, and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from slimfuse.recipe import Method, Parent, Recipe

AGAIN, UNTRAINED = "_again", "_untrained"  # no recipe's parent can have these names


@dataclass(frozen=True)
class Contender:
    """One way to a start. trains: also finetuned, with every budget; else a one-shot control.

    start: the kind of start to ask the recipe's stages for.
    """

    name: str
    recipe: Recipe
    trains: bool = True
    start: str = "fused"


def ladder(recipe: Recipe, best: str, copy: str, untrained: str) -> list[Contender]:
    """Return the recipe's own method, the others with what settings they share, and the controls.

    best: the best of the parents that are fused, which methods for one parent start from; copy:
    its folder; untrained: the folder of a model of its shape with random weights. Methods that
    can't be made of the recipe's parents are refused when they are prepared. Teachers are the
    recipe's own for all. Titles are the same whichever parent is the best.
    """
    own = recipe.fuse.method
    fused = list(recipe.fuse.parents or [p.name for p in recipe.parents])
    one = fused[0] if len(fused) == 1 else "best parent"
    found = [Contender(_title(own, fused), _changed(recipe, own, fused))]
    if len(fused) > 1 and own in ("refit", "gauge"):
        found.append(Contender(_title(own, [one]), _changed(recipe, own, [best])))
    for method in get_args(Method):
        if method == own or (method == "gauge" and len(fused) < 2) or method == "random-refit":
            continue
        if method in ("refit", "gauge", "ot", "vanilla"):
            found.append(Contender(_title(method, fused), _changed(recipe, method, fused)))
        else:
            found.append(Contender(_title(method, [one]), _changed(recipe, method, [best])))
    again = _changed(_with(recipe, AGAIN, copy), own, [best, AGAIN])
    random = _changed(_with(recipe, UNTRAINED, untrained), own, [UNTRAINED])
    controls = []
    if own in ("refit", "gauge"):
        same = _changed(recipe, own, fused)
        controls.append(Contender("random model + the same refit", same, False, "random-refit"))
    return [
        *found,
        Contender(f"self-fusion of {one}", again, False),
        Contender(f"{own}, random-weight parent", random, False),
        *controls,
    ]


def _title(method: str, fused: Sequence[str]) -> str:
    return "random start" if method == "random" else f"{method}, {' + '.join(fused)}"


def _with(recipe: Recipe, name: str, folder: str) -> Recipe:
    """Return the recipe with one more parent, which teaches nothing."""
    parent = Parent.model_validate({"name": "x", "from": folder})
    parent = parent.model_copy(update={"name": name})
    teachers = recipe.finetune.distill.teachers or tuple(p.name for p in recipe.parents)
    distill = recipe.finetune.distill.model_copy(update={"teachers": teachers})
    finetune = recipe.finetune.model_copy(update={"distill": distill})
    parents = (*recipe.parents, parent)
    return recipe.model_copy(update={"parents": parents, "finetune": finetune})


def _changed(recipe: Recipe, method: Method, fused: Sequence[str]) -> Recipe:
    fuse = recipe.fuse.model_copy(update={"method": method, "parents": tuple(fused)})
    return recipe.model_copy(update={"fuse": fuse, "baselines": ()})
