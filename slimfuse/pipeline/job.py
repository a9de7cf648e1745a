"""From a recipe to checked inputs: everything that can be known to fail fails here, first."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from slimfuse_export.environment import cores_allowed, cpu_quota

from slimfuse.data import DataSet
from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Family, ImageFamily, TextFamily, family_of
from slimfuse.finetune.loop import Precision, best_precision
from slimfuse.pipeline.checks import (
    check_compiler,
    check_extras,
    check_methods,
    check_samples,
    check_teachers,
    measured_by,
)
from slimfuse.pipeline.common import BaseJob, Opened, ParentJob
from slimfuse.pipeline.held_out import parts
from slimfuse.pipeline.images import open_images
from slimfuse.pipeline.labelling import check_training, class_places, with_labels
from slimfuse.pipeline.origins import find_parent, weights_digest
from slimfuse.pipeline.protecting import old_samples
from slimfuse.pipeline.shaping import propose_shape, trained_config
from slimfuse.pipeline.texts import open_texts
from slimfuse.pipeline.vocabularies import aligned_config
from slimfuse.recipe import Recipe, Training
from slimfuse.recipe.matching import IMAGE_FAMILIES
from slimfuse.shapes import Proposal
from slimfuse.tasks import TASKS, FeatureExtraction, LanguageTask, Task, TextTask
from slimfuse.tasks.embeddings import IMAGES, TEXTS, ImageFeatures, SentenceEmbedding


@dataclass(frozen=True)
class Job(BaseJob):
    """A recipe of a declared family whose inputs were opened and fit each other."""

    recipe: Recipe
    family: Family
    proposal: Proposal

    @property
    def libraries(self) -> tuple[str, ...]:
        """What computes the stages: timm reads or holds models of images, tokenizers cut texts."""
        own = "timm" if self.recipe.family in IMAGE_FAMILIES else "tokenizers"
        return (*super().libraries, own)

    @property
    def by_width(self) -> tuple[ParentJob, ...]:
        """The parents that are fused, in this order: the widest is the anchor."""
        width = {p.name: self.family.shape(p.config).hidden_size for p in self.parents}
        return tuple(sorted(self.fused, key=lambda p: -width[p.name]))


def prepare(recipe: Recipe, path: Path) -> Job:
    """Open data and parents and check that they fit each other and the target.

    path: the recipe's file; relative paths in it are looked up beside it, then in the current
    folder. Raises ParentError, DataError or ShapeError; nothing has been written by then. A
    latency budget is measured here, with models of random weights; allocation by saliency scores
    the largest parent.
    """
    check_extras(recipe)
    check_compiler(recipe)
    family, task = family_of(recipe.family, recipe.task), task_of(recipe)

    def find(name: str, origin: str | None, where: str, revision: str | None = None) -> Path | None:
        if origin is None:
            return None
        return find_parent(name, origin, revision, path.parent, task, where=where)

    spec = recipe.fuse.ot.anchor
    saved, starts = {}, {}
    for p in recipe.parents:
        saved[p.name] = find(p.name, p.from_, f"parents.{p.name}", p.revision)
        start = p.train.start if p.train is not None else None
        starts[p.name] = find(p.name, start, f"parents.{p.name}.train")
    folders = {name: folder for name, folder in saved.items() if folder is not None}
    beside = {name: folder for name, folder in starts.items() if folder is not None}
    home = find("anchor", spec.from_, "fuse.ot.anchor") if spec is not None else None
    if home is not None:
        beside["anchor"] = home
    configs = {name: family.load_config(str(folder)) for name, folder in folders.items()}
    opened = _open(recipe, family, task, folders | beside, configs, path.parent)
    task, orders = opened.task, opened.orders
    family = read_by(family, task)
    given = recipe.finetune.validation
    asked = None if given is None else len(parts(len(opened.data.train), given, 0).held_out)
    # embeddings are judged by the loss, which needs no neighbours
    held_out = None if task.compares else asked
    check_samples(task, opened.data, recipe.data.limit.test, held_out)
    foreign = [name for name in beside if name in orders]
    if foreign:
        raise ParentError(
            "a model that training starts from numbers its tokens differently",
            where=f"parents.{foreign[0]}.train.start" if foreign[0] in starts else "fuse.ot.anchor",
            got=str(beside[foreign[0]]),
            hint="start from models with one tokenizer; saved parents may have their own numbers",
        )
    for name, order in orders.items():
        if name in folders:
            where = f"parents.{name}"
            configs[name] = aligned_config(family, configs[name], order, where=where)
    for p in recipe.parents:
        if p.train is not None:
            where = f"parents.{p.name}.train"
            check_training(p.train, opened.data, where)
            fresh = trained_config(family, p.train, opened, starts[p.name], where)
            configs[p.name] = task.marked(fresh)
    configs = {p.name: configs[p.name] for p in recipe.parents}
    mismatched = family.mismatches(configs)
    if mismatched:
        raise ParentError(
            "the parents don't fit each other", where="parents", got="; ".join(mismatched)
        )
    task = reading(task, family, next(iter(configs.values())))
    places = _places(task, configs, opened.data)
    for folder in folders.values():
        family.load(folder)  # strict, and sees a file that was cut off
    threads = recipe.runtime.threads or cores()
    measured = measured_by(recipe, configs)
    proposal = propose_shape(recipe, measured, family, opened, saved, threads)
    target = proposal.config
    if task.labelled:
        target = task.marked(with_labels(target, configs, opened.data))
    parents = tuple(
        parent_job(
            p.name, p.weight, configs[p.name], saved[p.name], p.train, places[p.name],
            starts[p.name], orders.get(p.name), p.from_ or (p.train.start if p.train else None),
        )
        for p in recipe.parents
    )  # fmt: skip
    anchor = _anchor(recipe, home, family, task, opened, target)
    job = Job(
        recipe, path, family, task, opened.data, opened.preprocessor, parents, anchor, target,
        threads, best_of(recipe.runtime.precision), opened, proposal,
    )  # fmt: skip
    check_methods(recipe, job.by_width, target, family, anchor)
    check_teachers(recipe, job.teachers, target)
    old_samples(job)
    return job


def task_of(recipe: Recipe) -> Task:
    """Return a recipe's task; features are those of images or of texts, as the family's are."""
    task = TASKS[recipe.task]
    if isinstance(task, FeatureExtraction):
        return IMAGES if recipe.family in IMAGE_FAMILIES else TEXTS
    return task


def read_by(family: Family, task: Task) -> Family:
    """Return the family whose models without a head are read as their sentence encoders are."""
    if not isinstance(task, SentenceEmbedding):
        return family
    found: Any = copy.copy(family)
    found.ending = replace(found.ending, readout=task.readout)
    return cast(Family, found)


def reading(task: Task, family: Family, config: Any) -> Task:
    """Return the task with features of images that are the tokens that the parents' heads read."""
    if not isinstance(task, ImageFeatures):
        return task
    layout = family.layout(config)
    assert layout.readout == "mean" or isinstance(layout.readout, int), "of one width"
    return task.reading(layout.readout, layout.prefix)


def _places(task: Task, configs: Mapping[str, Any], data: DataSet) -> dict[str, tuple[int, ...]]:
    """Return the places of every parent's classes among the data's, see `class_places`.

    Without labels all parents say the same; where labels don't exclude each other, each parent
    must know all of them, in the data's order.
    """
    if not task.labelled:
        return dict.fromkeys(configs, ())
    places = class_places(configs, data)
    odd = [name for name, own in places.items() if own != tuple(range(len(data.classes)))]
    if odd and not task.by_class:
        raise ParentError(
            "parents of this task must know all of the data's labels, in its order",
            where=f"parents.{odd[0]}",
            got=", ".join(map(str, configs[odd[0]].id2label.values())),
            allowed=", ".join(data.classes),
        )
    return places


def _open(
    recipe: Recipe,
    family: Family,
    task: Task,
    folders: Mapping[str, Path],
    configs: Mapping[str, Any],
    beside: Path,
) -> Opened:
    data = recipe.data
    if recipe.family in IMAGE_FAMILIES:
        return open_images(data, cast(ImageFamily, family), folders, configs, beside, task)
    every = {name: family.load_config(str(folder)) for name, folder in folders.items()}
    if isinstance(task, LanguageTask):
        task = task.packing(data.packing)
    else:  # only language models have joined texts
        data = data.model_copy(update={"packing": False})
    assert isinstance(task, TextTask)
    return open_texts(data, cast(TextFamily, family), folders, every, beside, task)


def best_of(precision: Literal["auto", "fp32", "bf16"]) -> Precision:
    """Return the arithmetic of training that a recipe asks for."""
    return best_precision() if precision == "auto" else precision


def parent_job(
    name: str,
    weight: float,
    config: Any,
    folder: Path | None,
    train: Training | None,
    places: tuple[int, ...],
    start: Path | None = None,
    order: Mapping[int, int] | None = None,
    origin: str | None = None,
) -> ParentJob:
    """Return a parent with the digest of its weights, or of those that it starts from."""
    home = folder or start
    sha256 = None if home is None else weights_digest(home)
    return ParentJob(name, weight, config, folder, sha256, train, places, start, order, origin)


def _anchor(
    recipe: Recipe, folder: Path | None, family: Family, task: Task, opened: Opened, target: Any
) -> ParentJob | None:
    """Return the trained narrow model of `fuse.ot.anchor`, which has the target's shape."""
    spec, where, data = recipe.fuse.ot.anchor, "fuse.ot.anchor", opened.data
    if spec is None:
        return None
    if folder is not None:
        config = family.load_config(str(folder))
        family.load(folder)
    else:
        assert spec.train is not None
        check_training(spec.train, data, f"{where}.train")
        config = task.marked(trained_config(family, spec.train, opened, None, f"{where}.train"))
    if family.shape(config) != family.shape(target):
        raise ShapeError(
            "the anchor is not of the target's shape",
            where=where,
            got=str(family.shape(config)),
            allowed=str(family.shape(target)),
        )
    if not task.labelled:
        return parent_job("anchor", 1.0, config, folder, spec.train, ())
    places = class_places({"anchor": config}, data, where=where)["anchor"]
    if places != tuple(range(len(data.classes))):
        raise ParentError(
            "the anchor must know all of the data's classes, in its order",
            where=where,
            got=f"{len(places)}: {', '.join(map(str, config.id2label.values()))}",
        )
    return parent_job("anchor", 1.0, config, folder, spec.train, places)


def cores() -> int:
    """Return the processor cores this process may use: those allowed, no more than its quota."""
    quota = cpu_quota()
    return cores_allowed() if quota is None else min(cores_allowed(), max(1, int(quota)))
