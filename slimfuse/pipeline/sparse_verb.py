"""`sparsify`: prune one parent of a recipe at its own shape, a `compress` with other keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimfuse.pipeline.run import Run, compress
from slimfuse.progress import console
from slimfuse.recipe import AnyRecipe, NetRecipe, load_recipe
from slimfuse.recipe.matching import SPEED
from slimfuse.recipe.models import check_reference
from slimfuse.recipe.problems import InvalidRecipe, Place, Problem
from slimfuse.recipe.sparsifying import own_sparsity

SPARSITY = 0.8
SUFFIX = "-sparse"
NAME_LENGTH = 64


@dataclass(frozen=True)
class Pruning:
    """What the command line asks for; None: as the recipe says.

    parent: a parent's name; sparsity: a share of zeros; scorer, pattern, steps: as in a recipe.
    """

    parent: str | None = None
    sparsity: float | None = None
    scorer: str | None = None
    pattern: str | None = None
    steps: int | None = None


def sparsify(
    recipe: str | Path,
    *,
    parent: str | None = None,
    sparsity: float | None = None,
    scorer: str | None = None,
    pattern: str | None = None,
    steps: int | None = None,
    overrides: tuple[str, ...] = (),
    out: str | Path | None = None,
) -> Run:
    """Prune one parent of a recipe, by default the first, and return the finished run.

    It is `compress` with `fuse.method: keep`, the parent's own shape, no baselines and no dense
    finetuning; zeros as in the recipe's `sparsify`, else 80 % by WoodFisher. Gates on speed and
    parameters, which zeros don't change, are left out. parent, sparsity, scorer, pattern, steps:
    instead of the recipe's. overrides, out: see `compress`; out is `runs/NAME-sparse` by default.
    """
    path, asked = Path(recipe), Pruning(parent, sparsity, scorer, pattern, steps)
    # what the file says, and how the overrides change its other keys
    loaded = load_recipe(path, [o for o in overrides if not o.lstrip().startswith("sparsify")])
    _check_parent(asked.parent, loaded)
    left = [gate.metric for gate in loaded.gates if gate.metric in SPEED]
    if left:
        console.print(f"  left out: gates on {', '.join(left)}, which zeros don't change")
    changes = (*_defaults(loaded, asked), *overrides, *_asked(loaded, asked), *_kept(loaded, asked))
    return compress(path, overrides=changes, out=out)


def _check_parent(name: str | None, recipe: AnyRecipe) -> None:
    if name is None:
        return
    found = check_reference(("parent",), name, [p.name for p in recipe.parents])
    if found:
        place = Place(f"--parent {name}")
        problem = Problem(place, (), found[0].what, found[0].meant, allowed=found[0].allowed)
        raise InvalidRecipe([problem])


def _defaults(recipe: AnyRecipe, asked: Pruning) -> list[str]:
    """Return what the recipe leaves open; its dense finetuning becomes the recovery."""
    epochs = recipe.finetune.epochs
    if recipe.sparsify is None:
        return [_set("sparsify", {"sparsity": SPARSITY, "epochs": epochs})]
    return [_set("sparsify.epochs", epochs)] if recipe.sparsify.epochs is None else []


def _asked(recipe: AnyRecipe, asked: Pruning) -> list[str]:
    """Return what the command line asks for, and what would contradict it taken back."""
    found: dict[str, Any] = {}
    if asked.pattern is not None:
        found["pattern"] = asked.pattern
        if own_sparsity(asked.pattern) is not None:
            found["sparsity"] = None
    if asked.sparsity is not None:
        found["sparsity"] = asked.sparsity
    if asked.scorer is not None:
        found["scorer"] = asked.scorer
        controls = recipe.sparsify.controls if recipe.sparsify is not None else None
        if controls is not None and asked.scorer in controls:
            found["controls"] = [c for c in controls if c != asked.scorer]
    if asked.steps is not None:
        found["steps"] = asked.steps
    return [_set(f"sparsify.{key}", value) for key, value in found.items()]


def _kept(recipe: AnyRecipe, asked: Pruning) -> list[str]:
    """Return what makes a run of one parent at its own shape."""
    fused: Sequence[str] = recipe.fuse.parents or [recipe.parents[0].name]
    method = "unfused" if isinstance(recipe, NetRecipe) else "keep"
    gates = [
        gate.model_dump(mode="json", exclude_none=True)
        for gate in recipe.gates
        if gate.metric not in SPEED
    ]
    return [
        _set("name", recipe.name[: NAME_LENGTH - len(SUFFIX)] + SUFFIX),
        _set("fuse", {"method": method, "parents": [asked.parent or fused[0]]}),
        _set("target", {}), _set("baselines", []), _set("gates", gates),
        _set("finetune.epochs", 0),
    ]  # fmt: skip


def _set(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"
