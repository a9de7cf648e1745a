"""From a recipe's sizes and budgets to configs: the target's and those of parents to be trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfuse.batch import Inputs
from slimfuse.diagnose.answers import Labelled
from slimfuse.diagnose.spectrum import TRUST, Spectrum, by_value, spectra
from slimfuse.errors import ShapeError
from slimfuse.families import Family, Shape
from slimfuse.fuse.narrowing import count_rows
from slimfuse.fuse.scoring import cut_losses, subject
from slimfuse.pipeline.answering import kind_of, reading
from slimfuse.pipeline.calibration import calibration
from slimfuse.pipeline.common import Opened
from slimfuse.pipeline.labelling import labelled
from slimfuse.pipeline.vocabularies import align
from slimfuse.progress import working
from slimfuse.recipe import Recipe, Target, Train, TrainConfig
from slimfuse.shapes import Budget, Losses, Proposal, Wish, resolve
from slimfuse.tasks import Task


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
    of random weights; one that is allocated by saliency or spectra scores the largest parent
    (`cut_losses`, `_rises`) with so many threads, the same each time. Spectra whose rise is outside
    the trust region leave the budget proportional.
    """
    from slimfuse.pipeline.timing import Timer

    largest = largest_config(configs, family)
    wish = wish_of(recipe.target)
    budget, losses, note = recipe.target.budget, None, ()  # type: Any, Losses | None, Any
    if budget is not None and budget.allocation != "proportional":
        shapes = {name: family.shape(config) for name, config in configs.items()}
        name = _deciding(recipe, shapes, family.shape(largest), saved, wish.shrinking)
        losses, seen = _losses(recipe, name, saved[name], family, opened, threads)
        said = f"{name}, the largest, says" if len(shapes) > 1 else f"{name} says"
        note = (f"budget: parent {said} what each size is worth, on {seen} calibration samples.",)

    def resolved(losses: Losses | None) -> Proposal:
        if wish.budget is None or wish.budget.kind != "latency_ratio":
            return resolve(wish, largest, family, losses=losses)
        with Timer(recipe, largest, family, opened.example) as timer:
            return resolve(wish, largest, family, time_ratio=timer, losses=losses)

    proposal = resolved(losses)
    if losses is not None and budget.allocation == "spectrum":
        rise = sum(losses[axis][getattr(proposal.shape, axis)] for axis in wish.shrinking)
        note = (*note, _trusted(rise))
        if rise > TRUST:
            proposal = resolved(None)
    return replace(proposal, notes=(*proposal.notes, *note))


def _trusted(rise: float) -> str:
    """Return what is to be thought of a shape whose loss rises by so many nats at least."""
    said = f"budget: by the spectra the loss rises by {rise:.3g} nats at least"
    if rise <= TRUST:
        return f"{said}, inside the trust region ({TRUST} nats)."
    return (
        f"{said}, outside the trust region ({TRUST} nats), where they order nothing: all shrink by "
        "one share instead."
    )


def _deciding(
    recipe: Recipe,
    shapes: Mapping[str, Shape],
    top: Shape,
    saved: Mapping[str, Path | None],
    free: Sequence[str],
) -> str:
    """Return the fused parent that says what every free size is worth; raises ShapeError."""
    where = "target.budget.allocation"
    assert recipe.target.budget is not None
    kind = recipe.target.budget.allocation
    fused = recipe.fuse.parents or tuple(shapes)
    wanted = {axis: getattr(top, axis) for axis in free}
    largest = [n for n in fused if all(getattr(shapes[n], a) == v for a, v in wanted.items())]
    if not largest:
        raise ShapeError(
            f"{kind} allocates by one parent, and none has the largest of every free size",
            where=where,
            got="; ".join(f"{name}: {shapes[name]}" for name in fused),
            allowed="a fused parent with " + ", ".join(f"{a} {v}" for a, v in wanted.items()),
            hint="name fewer sizes in target.budget.free, or leave it at proportional",
        )
    ready = [name for name in largest if saved[name] is not None]
    if not ready:
        raise ShapeError(
            f"{kind} needs the largest parent's weights, and this run is yet to train it",
            where=where,
            got=f"{kind}, with parents.{largest[0]}.train",
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

    def labelled_batches() -> Iterator[Labelled]:
        return (task.examples(samples, chunk) for chunk in chunks)

    def batches() -> Iterator[Inputs]:
        return (inputs for inputs, _ in labelled_batches())

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with working(f"scoring parent {name}"):
            model = family.load(folder)
            if name in opened.orders:
                model = align(family, model, opened.orders[name], where=f"parents.{name}")
            if recipe.target.budget is not None and recipe.target.budget.allocation == "spectrum":
                return _rises(model, family, task, labelled_batches()), sum(map(len, chunks))
            rows = count_rows(model, family.layout(model.config), batches())
            mended = fuse.method == "refit" or (fuse.method == "gauge" and fuse.refit)
            losses = cut_losses(subject(model, family, batches, rows), mended=mended)
    finally:
        torch.set_num_threads(before)
    return losses, sum(map(len, chunks))


def _rises(model: nn.Module, family: Family, task: Task, batches: Iterator[Labelled]) -> Losses:
    """Return what the loss rises by at least with only so many of each width, by axis.

    What MLPs and heads lose adds up over the layers; of the stream, which is one for all of them,
    the layer counts that loses most.
    """
    layout, shape = family.layout(model.config), family.shape(model.config)
    blocks = range(len(layout.blocks))
    sites: dict[str, str] = {}
    for i, block in zip(blocks, layout.blocks, strict=True):
        sites |= {f"stream {i}": block.path, f"heads {i}": block.o, f"mlp {i}": block.down}
    found, _ = spectra(model, batches, sites, kind_of(task), reading(task, labels=False))
    by_name = {one.name: one for one in found}

    def of(kind: str) -> list[Spectrum]:
        return [by_name[f"{kind} {i}"] for i in blocks]

    whole = range(shape.hidden_size + 1)
    heads, mlps = of("heads"), of("mlp")
    each = heads[0].width // shape.num_attention_heads
    return {
        "hidden_size": [max(s.tail(n) for s in of("stream")) for n in whole],
        "num_attention_heads": by_value(
            heads, [each * n for n in range(shape.num_attention_heads + 1)]
        ),
        "intermediate_size": by_value(mlps, range(shape.intermediate_size + 1)),
    }


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
