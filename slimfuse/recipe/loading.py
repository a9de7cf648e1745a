"""From a recipe file to its model, to the schema, and to the list of recipes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails

from slimfuse.errors import RecipeError
from slimfuse.recipe.explain import explain
from slimfuse.recipe.inputs import Parent
from slimfuse.recipe.matching import TASK_FAMILIES
from slimfuse.recipe.models import Recipe
from slimfuse.recipe.nets import NetParent, NetRecipe
from slimfuse.recipe.overrides import apply_override
from slimfuse.recipe.problems import InvalidRecipe, Loc, Problem
from slimfuse.recipe.tree import MAX_BYTES, Tree, read_file

AnyRecipe = Recipe | NetRecipe
MODELS: dict[str, type[AnyRecipe]] = {
    family: Recipe for families in TASK_FAMILIES.values() for family in families
}
MODELS["auto"] = NetRecipe
"""The model of a recipe by its family."""


@dataclass(frozen=True)
class RecipeInfo:
    """One line of `slimfuse recipe list`; `error` is set where the file is no valid recipe."""

    path: Path
    name: str
    family: str
    task: str
    summary: str
    error: RecipeError | None = None


@dataclass(frozen=True)
class Located:
    """A recipe with the places of its keys."""

    recipe: AnyRecipe
    tree: Tree

    def locate(self, where: str | None) -> str | None:
        """Put file:line before a `where` that names a key (`target.hidden_size`, `parents.a.from`).

        The key may be followed by more words; anything else is returned as it is.
        """
        key = (where or "").partition(" ")[0]
        top, _, rest = key.partition(".")
        if top not in type(self.recipe).model_fields:
            return where
        loc: Loc = (top, *filter(None, rest.split(".")))
        if top == "parents":  # by name, which may hold dots, where the file has an index
            parents: tuple[Parent | NetParent, ...] = self.recipe.parents
            for i, parent in sorted(enumerate(parents), key=lambda item: len(item[1].name)):
                if f"{rest}.".startswith(f"{parent.name}."):
                    loc = (top, i, *filter(None, rest[len(parent.name) :].split(".")))
        return f"{self.tree.place(loc)}: {where}"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Return the recipe of a YAML file, after overrides like `finetune.lr=1e-3`.

    Raises: RecipeError (InvalidRecipe, with every problem) where file or overrides don't hold.
    """
    return load_located(path, overrides).recipe


def load_located(path: Path, overrides: Sequence[str] = ()) -> Located:
    """Return what `load_recipe` does, with the places of the keys for errors to come."""
    return _located(read_file(path), overrides)


def load_locked(path: Path, overrides: Sequence[str] = ()) -> Located:
    """Return the recipe that a recipe.lock.yaml holds, with the places of its keys there."""
    return _located(read_file(path).below("recipe"), overrides)


def _located(tree: Tree, overrides: Sequence[str]) -> Located:
    for override in overrides:
        apply_override(tree, override)
    recipe, wrong = _validate(tree)
    problems = tree.problems + [
        problem
        for problem in wrong
        if not any(problem.loc[:n] in tree.unreadable for n in range(len(problem.loc) + 1))
    ]
    if problems or recipe is None:
        # in the order of the file's lines, then the overrides
        raise InvalidRecipe(sorted(problems, key=_order))
    return Located(recipe, tree)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe, every key described."""
    families: Any = [(model, "validation") for model in dict.fromkeys(MODELS.values())]
    refs, schema = models_json_schema(families)
    shared = [key for key in _schema(Recipe)["required"] if key in _schema(NetRecipe)["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "required": shared,
        "oneOf": [refs[model, "validation"] for model in dict.fromkeys(MODELS.values())],
        **schema,
    }


def find_recipes(root: Path) -> list[RecipeInfo]:
    """Return every `*.yaml` below a folder in order of path, faulty ones with their error."""
    if not root.is_dir():
        raise RecipeError("no such folder of recipes", where=str(root))
    return [_info(path) for path in sorted(root.rglob("*.yaml"))]


@functools.cache
def _schema(model: type[AnyRecipe]) -> dict[str, Any]:
    """Return a model's schema in which `family` may have any known value, for messages."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    schema["properties"]["family"] = {"enum": list(MODELS)}
    return schema


def _validate(tree: Tree) -> tuple[AnyRecipe | None, list[Problem]]:
    family = tree.data.get("family")
    known = isinstance(family, str) and family in MODELS
    # without a family, the one whose keys the file has is meant
    tries = [_try(tree, m) for m in ([MODELS[family]] if known else dict.fromkeys(MODELS.values()))]
    return min(tries, key=lambda found: len(found[1]))


def _try(tree: Tree, model: type[AnyRecipe]) -> tuple[AnyRecipe | None, list[Problem]]:
    try:
        return model.model_validate(tree.data), []
    except ValidationError as error:
        items = error.errors(include_url=False)
    return None, [explain(item, tree, _schema(model)) for item in items if not _is_echo(item)]


def _is_echo(item: ErrorDetails) -> bool:
    """Tell a list that is only too short because pydantic left out its faulty items."""
    return item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]


def _order(problem: Problem) -> tuple[bool, int]:
    return problem.place.line is None, problem.place.line or 0


def _info(path: Path) -> RecipeInfo:
    summary = _summary(path)
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        return RecipeInfo(path, path.stem, "", "", summary, error)
    return RecipeInfo(path, recipe.name, recipe.family, recipe.task, summary)


def _summary(path: Path) -> str:
    """Return the file's first comment line that is for readers, if it stands at the top."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            lines = file.read(MAX_BYTES).splitlines()
    except OSError:
        return ""
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            break
        text = text.lstrip("# ")
        if text and not text.startswith("yaml-language-server:"):
            return text
    return ""
