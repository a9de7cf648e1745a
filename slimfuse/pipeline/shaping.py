"""From a recipe's sizes and budgets to configs: the target's and those of parents to be trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from slimfuse.batch import Inputs
from slimfuse.errors import ShapeError
from slimfuse.families import Family, Shape
from slimfuse.fuse.narrowing import count_rows
from slimfuse.fuse.scoring import cut_losses, subject
from slimfuse.pipeline.calibration import calibration
from slimfuse.pipeline.common import Opened
from slimfuse.pipeline.labelling import labelled
from slimfuse.pipeline.vocabularies import align
from slimfuse.progress import working
from slimfuse.recipe import Recipe, Target, Train, TrainConfig
from slimfuse.shapes import Budget, Losses, Proposal, Wish, resolve


def propose_shape(
    recipe: Recipe,
    configs: Mapping[str, Any],
    family: Family,
    opened: Opened,
    saved: Mapping[str, Path | None],
    threads: int,
) -> Proposal:
    """Return the planner's proposal for the target; raises ShapeError.

    saved: the parents' folders, None of those that the run trains. Ratios are of the largest
    parent: the widest, with the depth of the deepest. A latency budget exports and times candidates
    of random weights; one that is allocated by saliency scores the largest parent (`cut_losses`)
    with so many threads, the same each time.
    """
    from slimfuse.pipeline.timing import Timer

    largest = largest_config(configs, family)
    wish = wish_of(recipe.target)
    budget, losses, note = recipe.target.budget, None, ()  # type: Any, Losses | None, Any
    if budget is not None and budget.allocation == "saliency":
        shapes = {name: family.shape(config) for name, config in configs.items()}
        name = _deciding(recipe, shapes, family.shape(largest), saved, wish.shrinking)
        losses, seen = _losses(recipe, name, saved[name], family, opened, threads)
        said = f"{name}, the largest, says" if len(shapes) > 1 else f"{name} says"
        note = (f"budget: parent {said} what each size is worth, on {seen} calibration samples.",)
    if wish.budget is None or wish.budget.kind != "latency_ratio":
        proposal = resolve(wish, largest, family, losses=losses)
    else:
        with Timer(recipe, largest, family, opened.example) as timer:
            proposal = resolve(wish, largest, family, time_ratio=timer, losses=losses)
    return replace(proposal, notes=(*proposal.notes, *note))


def _deciding(
    recipe: Recipe,
    shapes: Mapping[str, Shape],
    top: Shape,
    saved: Mapping[str, Path | None],
    free: Sequence[str],
) -> str:
    """Return the fused parent that says what every free size is worth; raises ShapeError."""
    where = "target.budget.allocation"
    fused = recipe.fuse.parents or tuple(shapes)
    wanted = {axis: getattr(top, axis) for axis in free}
    largest = [n for n in fused if all(getattr(shapes[n], a) == v for a, v in wanted.items())]
    if not largest:
        raise ShapeError(
            "saliency allocates by one parent, and none has the largest of every free size",
            where=where,
            got="; ".join(f"{name}: {shapes[name]}" for name in fused),
            allowed="a fused parent with " + ", ".join(f"{a} {v}" for a, v in wanted.items()),
            hint="name fewer sizes in target.budget.free, or leave it at proportional",
        )
    ready = [name for name in largest if saved[name] is not None]
    if not ready:
        raise ShapeError(
            "saliency needs the largest parent's weights, and this run is yet to train it",
            where=where,
            got=f"saliency, with parents.{largest[0]}.train",
            allowed="proportional, or a saved parent (from)",
            hint="train it in a run of its own and name the model's folder in from",
        )
    return max(ready, key=lambda name: shapes[name] == top)


def _losses(
    recipe: Recipe, name: str, folder: Path | None, family: Family, opened: Opened, threads: int
) -> tuple[Losses, int]:
    """Return what a saved parent would lose with each size, and on how many samples it is seen."""
    assert folder is not None
    task, data, fuse = opened.task, opened.data, recipe.fuse
    samples, chunks = calibration(
        task, data.train, opened.preprocessor, recipe.data.calibration, fuse.batch_size,
        lambda: task.samples(data.train, opened.preprocessor),
    )  # fmt: skip

    def batches() -> Iterator[Inputs]:
        return (task.examples(samples, chunk)[0] for chunk in chunks)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with working(f"scoring parent {name}"):
            model = family.load(folder)
            if name in opened.orders:
                model = align(family, model, opened.orders[name], where=f"parents.{name}")
            rows = count_rows(model, family.layout(model.config), batches())
            mended = fuse.method == "refit" or (fuse.method == "gauge" and fuse.refit)
            losses = cut_losses(subject(model, family, batches, rows), mended=mended)
    finally:
        torch.set_num_threads(before)
    return losses, sum(map(len, chunks))


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
