"""Who takes part in a comparison: every method that fits the recipe, and the controls.

Or, in an ablation, the recipe with one key changed at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from slimfuse.errors import UserError
from slimfuse.recipe import Method, Parent, Recipe

AGAIN, UNTRAINED = "_again", "_untrained"  # no recipe's parent can have these names
VARIED = ("data", "parents", "target", "fuse", "finetune", "runtime")
AS_IS = ("keep", "random-refit")  # no other start, or a control of its own
ALIKE = {
    "finetune.epochs": "all rows are trained for the same steps: see --steps",
    "runtime.threads": "threads change no figure",
}


@dataclass(frozen=True)
class Contender:
    """One way to a start. All but controls are also finetuned, with every budget.

    start: the kind of start to ask the recipe's stages for.
    """

    name: str
    recipe: Recipe
    kind: Literal["method", "control", "ablation"] = "method"
    start: str = "fused"

    @property
    def trains(self) -> bool:
        """Whether it is finetuned."""
        return self.kind != "control"


def ladder(recipe: Recipe, best: str, copy: str, untrained: str) -> list[Contender]:
    """Return the recipe's own method, the others with what settings they share, and the controls.

    best: the best of the parents that are fused, which methods for one parent start from; copy:
    its folder; untrained: the folder of a model of its shape with random weights. Methods that
    can't be made of the recipe's parents are refused when they are prepared. Teachers are the
    recipe's own for all. Titles are the same whichever parent is the best.
    """
    own, fused = recipe.fuse.method, _fused(recipe)
    one = fused[0] if len(fused) == 1 else "best parent"
    found = [Contender(_title(own, fused), _changed(recipe, own, fused))]
    if len(fused) > 1 and own in ("refit", "gauge"):
        found.append(Contender(_title(own, [one]), _changed(recipe, own, [best])))
    for method in get_args(Method):
        if method == own or (method == "gauge" and len(fused) < 2) or method in AS_IS:
            continue
        if method in ("refit", "gauge", "ot", "vanilla"):
            found.append(Contender(_title(method, fused), _changed(recipe, method, fused)))
        else:
            found.append(Contender(_title(method, [one]), _changed(recipe, method, [best])))
    again = _changed(_with(recipe, AGAIN, copy), own, [best, AGAIN])
    random = _changed(_with(recipe, UNTRAINED, untrained), own, [UNTRAINED])
    return [
        *found,
        Contender(f"self-fusion of {one}", again, "control"),
        Contender(f"{own}, random-weight parent", random, "control"),
        *_refitted(recipe),
    ]


def ablation(recipe: Recipe, variants: Mapping[str, Recipe]) -> list[Contender]:
    """Return the recipe as it is, its variants by their names, and a refit's own control."""
    rows = [Contender(name, _own(one), "ablation") for name, one in variants.items()]
    title = _title(recipe.fuse.method, _fused(recipe))
    return [Contender(title, _own(recipe)), *rows, *_refitted(recipe)]


def variations(options: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides `KEY=VALUE` of options `KEY=V1,V2,…`, each once.

    Commas in brackets or quotes part no values. Raises UserError for another form and for keys that
    change nothing in a comparison; whether key and value are right is the recipe's matter.
    """
    found = []
    for option in options:
        key, values = split_option(option, "--vary", "fuse.units=cholesky,saliency")
        top = key.partition(".")[0]
        if key in ALIKE or (top in Recipe.model_fields and top not in VARIED):
            raise UserError(
                "no figure of a comparison can differ by this key",
                where="--vary",
                got=key,
                allowed=f"a key of {', '.join(VARIED)}",
                hint=ALIKE.get(key, "give it with --set, for all rows"),
            )
        found += [f"{key}={value}" for value in values]
    return tuple(dict.fromkeys(found))


def split_option(option: str, where: str, example: str) -> tuple[str, list[str]]:
    """Return the key and the values of `KEY=V1,V2,…`; raises UserError for another form.

    Commas in brackets or quotes part no values. where, example: for the error.
    """
    key, equals, text = option.partition("=")
    key, values = re.sub(r"\[([0-9]+)\]", r".\1", key.strip()), _values(text)
    if not key or not equals or not all(values):
        allowed = f"KEY=VALUE,VALUE, as in {example}"
        raise UserError("not a key and its values", where=where, got=option, allowed=allowed)
    return key, values


def _values(text: str) -> list[str]:
    """Return the values between the commas that stand in no bracket and no quotes."""
    found, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += character
    return [value.strip() for value in found]


def _refitted(recipe: Recipe) -> list[Contender]:
    """Return what the same refit makes of a random model, where the recipe refits."""
    if recipe.fuse.method not in ("refit", "gauge"):
        return []
    name = "random model + the same refit"
    return [Contender(name, _own(recipe), "control", "random-refit")]


def _own(recipe: Recipe) -> Recipe:
    """Return the recipe without its baselines."""
    return _changed(recipe, recipe.fuse.method, _fused(recipe))


def _fused(recipe: Recipe) -> list[str]:
    return list(recipe.fuse.parents or [p.name for p in recipe.parents])


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
