"""Whether a run's methods can be made of its parents, known before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from slimfuse.data import DataSet
from slimfuse.errors import DataError, ParentError, ShapeError, UserError, first_line
from slimfuse.families import Family
from slimfuse.recipe import AnyRecipe, Recipe
from slimfuse.tasks import Task
from slimfuse.tasks.embeddings import NEIGHBOURS

if TYPE_CHECKING:
    from slimfuse.pipeline.common import ParentJob

AVERAGING = ("vanilla", "gauge", "ot")
REFITTING = ("refit", "random-refit")
COPYING = ("subclone", "select", "intra")


def measured_by(recipe: Recipe, configs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parents whose sizes the target's are measured by: all, by their names.

    Of method keep with an empty target the one that is kept.
    """
    sizes = recipe.target.model_dump().values()
    if recipe.fuse.method != "keep" or any(size is not None for size in sizes):
        return configs
    fused = recipe.fuse.parents or list(configs)
    name = next(name for name in configs if name in fused)
    return {name: configs[name]}


def check_extras(recipe: AnyRecipe) -> None:
    """Raise UserError where the recipe asks for what an extra brings that isn't installed."""
    curves = recipe.runtime.tensorboard
    asked = (
        ("finetune.lora", "peft", "lora", recipe.finetune.lora is not None),
        ("runtime.tensorboard", "tensorboard", "tensorboard", curves),
    )
    for key, package, extra, wanted in asked:
        if wanted and find_spec(package) is None:
            raise UserError(
                f"{package} isn't installed",
                where=key,
                hint=f"pip install 'slimfuse[{extra}]', or leave the key out",
            )


def check_compiler(recipe: AnyRecipe) -> None:
    """Raise UserError where torch shall compile for a processor and there is no compiler."""
    if not recipe.finetune.compile or torch.cuda.is_available():
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise UserError(
            "torch finds no C++ compiler",
            where="finetune.compile",
            got=first_line(error),
            hint="install g++, or leave the key out",
        ) from error


def check_methods(
    recipe: Recipe,
    parents: Sequence[ParentJob],
    target: Any,
    family: Family,
    anchor: ParentJob | None,
) -> None:
    """Demand that the start's method and every baseline can be made of the fused parents.

    Raises ParentError or ShapeError at the recipe's key.
    """
    used = [("fuse.method", recipe.fuse.method), *(("baselines", b) for b in recipe.baselines)]
    for where, method in used:
        if method in AVERAGING:
            _check_average(method, where, parents, target, family)
        if method == "ot":
            _check_anchor(where, parents, family, anchor)
        if method in (*REFITTING, "gauge"):
            _check_size(parents, target, family)
        if method in COPYING:
            _check_copy(method, where, parents, target, family)
        if method == "keep":
            names = [p.name for p in recipe.parents]
            _check_kept(min(parents, key=lambda p: names.index(p.name)), where, target, family)
    if recipe.finetune.distill.hidden:
        _check_size(parents, target, family)
    if recipe.fuse.layers is not None and {m for _, m in used} & {*REFITTING, "gauge"}:
        _check_layers(recipe.fuse.layers, parents, target, family)


def _check_average(
    method: str, where: str, parents: Sequence[ParentJob], target: Any, family: Family
) -> None:
    shapes = {p.name: family.shape(p.config) for p in parents}
    wanted = family.shape(target)
    equal = {"vanilla": {*shapes.values(), wanted}, "gauge": set(shapes.values())}
    if len(equal.get(method, ())) > 1:
        raise ShapeError(
            f"method {method} averages parents of one shape"
            + (", the target's" if method == "vanilla" else ""),
            where=where,
            got="; ".join(f"{name}: {shape}" for name, shape in shapes.items()),
            allowed=str(wanted) if method == "vanilla" else None,
            hint="use method: refit, which takes any shapes",
        )
    if method == "ot" and {s.num_hidden_layers for s in shapes.values()} - {
        wanted.num_hidden_layers
    }:
        raise ShapeError(
            "method ot moves parents of the target's depth, layer to layer",
            where=where,
            got="; ".join(f"{name}: {s.num_hidden_layers} layers" for name, s in shapes.items()),
            allowed=f"{wanted.num_hidden_layers} layers",
            hint="use method: refit, which takes any depths",
        )
    odd = [p for p in parents if not _whole(p, target)]
    if odd:
        raise ParentError(
            f"method {method} averages parents class by class: each must know all of the data's "
            "classes, in its order",
            where=where,
            got="; ".join(_classes(p, target) for p in odd),
            hint="use method: refit, which unites parents of other classes",
        )


def _check_size(parents: Sequence[ParentJob], target: Any, family: Family) -> None:
    """Demand that the fused parents, which may not be all, have a stream to narrow."""
    shapes, wanted = [family.shape(p.config) for p in parents], family.shape(target)
    for key in ("hidden_size", "num_hidden_layers"):
        most, got = max(getattr(s, key) for s in shapes), getattr(wanted, key)
        if got > most:
            raise ShapeError(
                f"{key} of the target is larger than that of the parents that are fused",
                where="fuse.parents",
                got=f"{got} for {', '.join(p.name for p in parents)}",
                allowed=f"1 … {most}",
                hint="fuse a larger parent, too, or make the target smaller",
            )


def _check_layers(
    layers: Sequence[Sequence[int]], parents: Sequence[ParentJob], target: Any, family: Family
) -> None:
    """Demand that every block of the deepest fused parent stands for one target block."""
    count = max(family.shape(p.config).num_hidden_layers for p in parents)
    depth = family.shape(target).num_hidden_layers
    listed = [block for part in layers for block in part]
    if len(layers) != depth or not all(layers) or listed != list(range(count)):
        raise ShapeError(
            "the layers don't list every block of the deepest parent once, in order",
            where="fuse.layers",
            got=[list(part) for part in layers],
            allowed=f"{depth} lists, one a target block, of the blocks 0 … {count - 1}",
        )


def check_teachers(recipe: Recipe, teachers: Sequence[ParentJob], target: Any) -> None:
    """Demand that the teachers know all classes together, where they teach; raises ParentError."""
    recovery = recipe.sparsify.epochs if recipe.sparsify is not None else None
    if recipe.finetune.epochs > 0 or recovery:
        _check_cover("finetune.distill.teachers", "finetuning", teachers, target)


def check_samples(
    task: Task, data: DataSet, limit: int | None, held_out: int | None = None
) -> None:
    """Demand a test split that the task can be measured on; raises DataError.

    limit: the recipe's data.limit.test; held_out: how many training samples are, None where none
    are asked for. Neighbours are looked up among twice as many samples, of which half are near by
    chance; the interval of a rank correlation takes more than three.
    """
    least, why = 1, ""
    if task.compares:
        least, why = 2 * NEIGHBOURS, f"the {NEIGHBOURS} nearest of each are looked up"
    elif data.kind == "regression":
        least, why = 4, "a rank correlation of fewer has no interval"
    if held_out is not None and held_out < least:
        raise DataError(
            "too few training samples are held out to measure this task",
            where="finetune.validation.share",
            got=f"{held_out} {task.sample}{'s' * (held_out != 1)}",
            allowed=f"at least {least}{f': {why}' * bool(why)}",
            hint="raise the share, or give more training samples",
        )
    count = len(data.test)
    if count < least:
        cut = limit is not None and limit < least
        raise DataError(
            "the test split is too small to measure this task",
            where="data.limit.test" if cut else "data.test_split",
            got=f"{count} {task.sample}{'s' * (count != 1)}",
            allowed=f"at least {least}: {why}",
            hint="raise the limit" if cut else "put more samples into it, or name another split",
        )


def _check_cover(where: str, what: str, parents: Sequence[ParentJob], target: Any) -> None:
    known = {i for p in parents for i in p.places}
    missing = set(range(target.num_labels)) - known if known else set()
    if missing:
        raise ParentError(
            f"{what} needs parents that know all of the data's classes together",
            where=where,
            got="; ".join(_classes(p, target) for p in parents),
            hint="name the parents that know the rest, too",
        )


def _check_anchor(
    where: str, parents: Sequence[ParentJob], family: Family, anchor: ParentJob | None
) -> None:
    if anchor is None:
        raise ParentError(
            "method ot moves the parents to a trained narrow model, and none is given",
            where=where,
            got="no fuse.ot.anchor",
            hint="name one under fuse.ot.anchor, or use method: refit, which needs none",
        )
    lines = family.mismatches({"anchor": anchor.config, **{p.name: p.config for p in parents}})
    if lines:
        raise ParentError("the parents don't fit the anchor", where=where, got="; ".join(lines))


def _check_copy(
    method: str, where: str, parents: Sequence[ParentJob], target: Any, family: Family
) -> None:
    """Demand that the widest parent has enough units everywhere to copy from."""
    first = max(parents, key=lambda p: family.shape(p.config).hidden_size)
    deep, wanted = (family.shape(c).num_hidden_layers for c in (first.config, target))
    have, want = family.atlas(first.config), family.atlas(target)
    short = [
        f"{name}: {have.spaces[name].size} units, the target has {want.spaces[name].size}"
        for name in want.free
        if name in have.spaces and have.spaces[name].size < want.spaces[name].size
    ]
    if deep < wanted:
        short.append(f"{deep} blocks, the target has {wanted}")
    if short:
        raise ShapeError(
            f"{method} copies units of the widest parent, and {first.name} has too few",
            where=where,
            got="; ".join(short[:3]),
            hint="make the target smaller, fuse a larger parent, or choose another method",
        )
    if not _whole(first, target):
        raise ParentError(
            f"{method} copies the head of the widest parent: it must know all of the data's "
            "classes, in its order",
            where=where,
            got=_classes(first, target),
            hint="use method: refit, which unites parents of other classes",
        )


def _check_kept(parent: ParentJob, where: str, target: Any, family: Family) -> None:
    """Demand that the target takes the parent's weights as they are."""
    with torch.device("meta"):
        have, want = (family.build(c).state_dict() for c in (parent.config, target))
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in (have, want)]
    if shapes[0] != shapes[1] and _whole(parent, target):
        own, wanted = (str(family.shape(c)) for c in (parent.config, target))
        differing = [n for n in {**have, **want} if shapes[0].get(n) != shapes[1].get(n)]
        raise ShapeError(
            "method keep takes the first parent as it is: the target must have its shape",
            where=where,
            got=wanted if wanted != own else f"another {differing[0]}",
            allowed=f"{own}, as {parent.name} has it",
            hint="leave target empty ({}), or use a method that narrows",
        )
    if not _whole(parent, target):
        raise ParentError(
            "method keep keeps the head of the first parent: it must know all of the data's "
            "classes, in its order",
            where=where,
            got=_classes(parent, target),
            hint="use method: refit, which unites parents of other classes",
        )


def _whole(parent: ParentJob, target: Any) -> bool:
    return not parent.places or tuple(parent.places) == tuple(range(target.num_labels))


def _classes(parent: ParentJob, target: Any) -> str:
    if len(parent.places) == target.num_labels:
        return f"{parent.name} has them in another order"
    return f"{parent.name} knows {len(parent.places)} of {target.num_labels}"
