"""From a recipe of plain nets to checked inputs, as `job` does for declared families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.data import ImageData
from slimfuse.errors import DataError, ParentError, ShapeError, UserError
from slimfuse.nets import (
    Config,
    Footprint,
    MLPConfig,
    ResNetConfig,
    VGGConfig,
    footprint,
    load_classifier,
    load_config,
    narrow,
    new_classifier,
    pruned_config,
)
from slimfuse.pipeline.checks import check_extras
from slimfuse.pipeline.common import BaseJob, ParentJob
from slimfuse.pipeline.images import (
    DEFAULT_IMAGE_SIZE,
    Images,
    common_processor,
    image_size,
    load_images,
)
from slimfuse.pipeline.job import (
    best_of,
    cores,
    parent_job,
)
from slimfuse.pipeline.labelling import check_training
from slimfuse.pipeline.origins import find_parent
from slimfuse.recipe import NetConfig, NetRecipe, Pruned
from slimfuse.tasks import TASKS
from slimfuse.tasks.image_classification import load_processor

ANCHOR = "fuse.anchor"
NAMES = {"mlp": "MLP", "vgg": "VGG", "resnet": "ResNet"}


@dataclass(frozen=True)
class Widths:
    """The sizes of a net that may shrink, in execution order."""

    architecture: str
    widths: list[int]

    def __str__(self) -> str:
        return f"{NAMES[self.architecture]} {'-'.join(map(str, self.widths))}"


@dataclass(frozen=True)
class Nets:
    """Plain nets on images of one size, as a `Kind` of models."""

    image_size: int

    def build(self, config: Config, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised net behind a classifier's interface."""
        return new_classifier(config)

    def load_config(self, folder: str) -> Config:
        """Return the config of a saved net; raises ParentError."""
        return load_config(folder)

    def load(self, folder: str | Path, *, attention: str = "sdpa") -> nn.Module:
        """Return a saved net behind a classifier's interface; raises ParentError."""
        return load_classifier(folder)

    def stock_form(self, model: nn.Module) -> nn.Module:
        """Return the model itself."""
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        model.save_pretrained(folder)  # type: ignore[operator]

    def shape(self, config: Config) -> Widths:
        """Return the sizes that may shrink."""
        return Widths(config.architecture, list(config.widths))

    def footprint(self, config: Config) -> Footprint:
        """Return what one image costs; raises ParentError where the net doesn't take it."""
        return footprint(config, self.image_size)

    def flops(self, config: Config) -> int:
        """Return 2 × the multiply-adds of one image."""
        return self.footprint(config).flops

    @property
    def example(self) -> Tensor:
        """Two empty images (2, 3, height, width): something to trace a net on."""
        return torch.zeros(2, 3, self.image_size, self.image_size)


@dataclass(frozen=True)
class NetParentJob(ParentJob):
    """A parent that may be pruned from another one."""

    pruned: Pruned | None = None


@dataclass(frozen=True)
class NetJob(BaseJob):
    """A recipe of plain nets whose inputs were opened and fit each other.

    anchor: one that is no parent.
    """

    recipe: NetRecipe
    family: Nets

    @property
    def libraries(self) -> tuple[str, ...]:
        """What computes the stages: torch-pruning finds and prunes the units."""
        return (*super().libraries, "torch-pruning")

    @property
    def moves(self) -> bool:
        """Whether a method of the run needs the anchor."""
        return bool({"ot", "unfused"} & {self.recipe.fuse.method, *self.recipe.baselines})

    @property
    def base(self) -> ParentJob:
        """The net whose units the others are moved to."""
        if self.anchor is not None:
            return self.anchor
        spec = self.recipe.fuse.anchor
        return next(p for p in self.fused if spec is None or p.name == spec.parent)

    @property
    def moved(self) -> tuple[ParentJob, ...]:
        """The fused parents that are moved to the base's units."""
        return tuple(p for p in self.fused if p is not self.base)


def prepare_nets(recipe: NetRecipe, path: Path) -> NetJob:
    """Open data and parents and check that they fit each other and the target.

    path: the recipe's file, beside which relative paths are looked up first. Raises ParentError,
    DataError or ShapeError; nothing has been written by then.
    """
    task = TASKS[recipe.task]
    folders = {
        p.name: find_parent(p.name, p.from_, None, path.parent, task)
        for p in recipe.parents
        if p.from_ is not None
    }
    spec = recipe.fuse.anchor
    if spec is not None and spec.from_ is not None:
        folders["anchor"] = find_parent("anchor", spec.from_, None, path.parent, task, where=ANCHOR)
    sizes = {name: int(load_processor(f).size["height"]) for name, f in folders.items()}
    size = image_size(recipe.data, sizes)
    data = load_images(recipe.data, path.parent, size or DEFAULT_IMAGE_SIZE)
    size = size or data.image_size
    processor = common_processor(folders, data, size)
    nets = Nets(size)
    places = {p.name: f"parents.{p.name}" for p in recipe.parents}
    trained: dict[str, Any] = {p.name: p.train for p in recipe.parents}
    if spec is not None and spec.parent is None:
        places["anchor"], trained["anchor"] = ANCHOR, spec.train
    pruned = {p.name: p.pruned for p in recipe.parents}
    configs: dict[str, Config] = {}
    for name, where in places.items():
        cut, train = pruned.get(name), trained[name]
        if cut is not None:
            configs[name] = pruned_config(configs[cut.of], nets.example, cut.ratio)
            train, where = cut.train, f"{where}.pruned"
        elif name in folders:
            configs[name] = load_config(folders[name])
            nets.load(folders[name])  # strict, and sees a file that was cut off
        else:
            configs[name] = new_config(train.config, data, size)
        if train is not None:
            check_training(train, data, f"{where}.train")
        _check_data(configs[name], nets, data, where)
    _check_alike(configs, places)
    jobs = {
        name: NetParentJob(
            **vars(parent_job(name, 1.0, config, folders.get(name), trained[name], _all(data))),
            pruned=pruned.get(name),
        )
        for name, config in configs.items()
    }
    parents = tuple(replace(jobs[p.name], weight=p.weight) for p in recipe.parents)
    anchor = jobs.get("anchor")
    if anchor is not None and spec is not None:
        anchor = replace(anchor, weight=spec.weight)
    runtime = recipe.runtime
    job = NetJob(
        recipe, path, nets, task, data, processor, parents, anchor, None,
        runtime.threads or cores(), best_of(runtime.precision), Images(data, processor, size),
    )  # fmt: skip
    job = replace(job, target=_target(job))
    check_extras(recipe)
    _check_methods(job)
    return job


def new_config(spec: NetConfig, data: ImageData, size: int) -> Config:
    """Return the config of a net that the run trains, for RGB images of `size` pixels a side."""
    classes, labels = len(data.classes), tuple(data.classes)
    if spec.architecture == "mlp":
        return MLPConfig(3 * size**2, tuple(spec.hidden or ()), classes, labels)
    if spec.architecture == "vgg":
        return VGGConfig(
            3, size, tuple(spec.features or ()), tuple(spec.hidden or ()), classes,
            bool(spec.batch_norm), labels,
        )  # fmt: skip
    return ResNetConfig(
        3, tuple(spec.stages or ()), tuple(spec.blocks or ()), tuple(spec.inner or ()), classes,
        labels,
    )  # fmt: skip


def _all(data: ImageData) -> tuple[int, ...]:
    return tuple(range(len(data.classes)))


def _check_data(config: Config, nets: Nets, data: ImageData, where: str) -> None:
    """Demand that a net takes the data's images and knows its classes, in its order."""
    try:
        outputs = nets.footprint(config).outputs
    except UserError as error:
        error.where = where
        raise
    known = config.labels or tuple(data.classes)
    if outputs != len(data.classes) or known != tuple(data.classes):
        raise DataError(
            "the net's classes are not the data set's",
            where=where,
            got=f"{outputs}: {', '.join(config.labels[:6]) or 'without names'}",
            allowed=f"{len(data.classes)}: {', '.join(data.classes[:6])}",
            hint="use the data set that it was trained on",
        )


def _check_alike(configs: Mapping[str, Config], places: Mapping[str, str]) -> None:
    """Demand that the nets differ in nothing but their widths."""
    plain = {n: replace(narrow(c, [1] * len(c.widths)), labels=()) for n, c in configs.items()}
    (first, base), *others = plain.items()
    for name, config in others:
        if config != base:
            raise ParentError(
                "nets that differ in more than the widths of their layers can't be fused",
                where=places[name],
                got=f"{name}: {_text(configs[name])}",
                allowed=f"a net like {first}: {_text(configs[first])}",
            )


def _text(config: Config) -> str:
    values = {k: v for k, v in vars(config).items() if k not in ("labels", "classes")}
    return ", ".join(f"{k} {list(v) if isinstance(v, tuple) else v}" for k, v in values.items())


def _target(job: NetJob) -> Config:
    """Return the target's config; raises ShapeError."""
    wanted, base = job.recipe.target.widths, job.base.config
    labelled: Config = replace(base, labels=tuple(job.data.classes))
    if wanted is None:
        return labelled
    try:
        if isinstance(wanted, float):
            return narrow(labelled, narrow(job.fused[0].config, wanted).widths)
        return narrow(labelled, wanted)
    except ShapeError as error:
        error.where = "target.widths"
        raise


def _check_methods(job: NetJob) -> None:
    """Demand that the start's method and every baseline can be made of the parents."""
    used = [("fuse.method", job.recipe.fuse.method)]
    used += [("baselines", b) for b in job.recipe.baselines]
    wanted = list(job.target.widths)
    for where, method in used:
        if method in ("ot", "unfused") and list(job.base.config.widths) != wanted:
            raise ShapeError(
                f"method {method} makes a net of the anchor's widths",
                where="target.widths",
                got=wanted,
                allowed=f"null, or those of {job.base.name}: {list(job.base.config.widths)}",
                hint="give an anchor of the widths you want under fuse.anchor: a trained narrow "
                "net, or a parent that is pruned from another",
            )
        odd = [p for p in job.fused if list(p.config.widths) != wanted]
        if method == "vanilla" and odd:
            raise ShapeError(
                "method vanilla averages nets of one shape, the target's",
                where=where,
                got="; ".join(f"{p.name}: {list(p.config.widths)}" for p in odd),
                allowed=str(wanted),
                hint="use method: ot, which takes any widths",
            )
        if method == "ot" and not job.moved:
            raise ParentError(
                "method ot needs a net beside the anchor",
                where=where,
                got=job.base.name,
                hint="add a parent, or use method: unfused",
            )
