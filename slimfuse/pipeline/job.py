"""From a recipe to checked inputs: everything that can be known to fail fails here, first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from slimfuse_export.environment import cores_allowed, cpu_quota

from slimfuse.data import ImageData, Split, load_digits, load_fashion_mnist, load_hub
from slimfuse.errors import ParentError, ShapeError, first_line
from slimfuse.families import FAMILIES, Family
from slimfuse.finetune.loop import Precision, best_precision
from slimfuse.pipeline.checks import check_methods, check_teachers
from slimfuse.pipeline.common import BaseJob, ParentJob
from slimfuse.pipeline.labelling import check_training, class_places, with_labels
from slimfuse.pipeline.shaping import propose_shape, trained_config
from slimfuse.recipe import Data, Recipe, Training
from slimfuse.shapes import Proposal
from slimfuse.store import file_digest

PROCESSOR_KEYS = (
    "size", "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_convert_rgb",
)  # fmt: skip
DEFAULT_IMAGE_SIZE = 224


@dataclass(frozen=True)
class Job(BaseJob):
    """A recipe of a declared family whose inputs were opened and fit each other."""

    recipe: Recipe
    family: Family
    proposal: Proposal

    @property
    def by_width(self) -> tuple[ParentJob, ...]:
        """The parents that are fused, in this order: the widest is the anchor."""
        width = {p.name: self.family.shape(p.config).hidden_size for p in self.parents}
        return tuple(sorted(self.fused, key=lambda p: -width[p.name]))


def prepare(recipe: Recipe, path: Path) -> Job:
    """Open data and parents and check that they fit each other and the target.

    path: the recipe's file; relative paths in it are looked up beside it, then in the current
    folder. Raises ParentError, DataError or ShapeError; nothing has been written by then. A
    latency budget is measured here, with models of random weights.
    """
    family = FAMILIES[recipe.family]
    folders = {
        p.name: find_parent(p.name, p.from_, p.revision, path.parent)
        for p in recipe.parents
        if p.from_ is not None
    }
    spec = recipe.fuse.ot.anchor
    beside = {}
    if spec is not None and spec.from_ is not None:
        where = "fuse.ot.anchor"
        beside["anchor"] = find_parent("anchor", spec.from_, None, path.parent, where=where)
    configs = {name: family.load_config(str(folder)) for name, folder in folders.items()}
    size = image_size(recipe.data, {name: c.image_size for name, c in configs.items()})
    data = load_data(recipe.data, path.parent, size or DEFAULT_IMAGE_SIZE)
    size = size or data.image_size
    for parent in recipe.parents:
        if parent.train is not None:
            where = f"parents.{parent.name}.train"
            check_training(parent.train, data, where)
            configs[parent.name] = trained_config(family, parent.train, data, size, where)
    configs = {p.name: configs[p.name] for p in recipe.parents}
    mismatched = family.mismatches(configs)
    if mismatched:
        raise ParentError(
            "the parents don't fit each other", where="parents", got="; ".join(mismatched)
        )
    places = class_places(configs, data)
    processor = common_processor(folders | beside, data, size)
    for folder in folders.values():
        family.load(folder)  # strict, and sees a file that was cut off
    proposal = propose_shape(recipe, configs, family, processor)
    target = with_labels(proposal.config, configs, data)
    parents = tuple(
        parent_job(p.name, p.weight, configs[p.name], folders.get(p.name), p.train, places[p.name])
        for p in recipe.parents
    )
    anchor = _anchor(recipe, beside.get("anchor"), family, data, target, size)
    runtime = recipe.runtime
    job = Job(
        recipe, path, family, data, processor, parents, anchor, target,
        runtime.threads or cores(), best_of(recipe.runtime.precision), proposal,
    )  # fmt: skip
    check_methods(recipe, job.by_width, target, family, anchor)
    check_teachers(recipe, job.teachers, target)
    return job


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
) -> ParentJob:
    """Return a parent with the digest of its weights, where it has some."""
    sha256 = None if folder is None else file_digest(folder / "model.safetensors")
    return ParentJob(name, weight, config, folder, sha256, train, places)


def _anchor(
    recipe: Recipe, folder: Path | None, family: Family, data: ImageData, target: Any, size: int
) -> ParentJob | None:
    """Return the trained narrow model of `fuse.ot.anchor`, which has the target's shape."""
    spec, where = recipe.fuse.ot.anchor, "fuse.ot.anchor"
    if spec is None:
        return None
    if folder is not None:
        config = family.load_config(str(folder))
        family.load(folder)
    else:
        assert spec.train is not None
        check_training(spec.train, data, f"{where}.train")
        config = trained_config(family, spec.train, data, size, f"{where}.train")
    if family.shape(config) != family.shape(target):
        raise ShapeError(
            "the anchor is not of the target's shape",
            where=where,
            got=str(family.shape(config)),
            allowed=str(family.shape(target)),
        )
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


def find_parent(
    name: str, origin: str, revision: str | None, beside: Path, *, where: str | None = None
) -> Path:
    """Return the local folder of a parent, fetching a hub id once; raises ParentError."""
    where = where or f"parents.{name}"
    given = Path(origin).expanduser()
    for folder in (beside / given, given):
        if folder.is_dir():
            if revision is not None:
                raise ParentError(
                    "a revision goes only with a hub id, and this is a folder here",
                    where=f"{where}.revision",
                    got=revision,
                    hint="remove the key",
                )
            _need_files(name, folder)
            return folder
    hint = "give a folder with config.json, model.safetensors and preprocessor_config.json"
    looks_local = origin.startswith((".", "/", "~")) or origin.count("/") != 1
    top = Path(given.parts[0])
    if not looks_local and ((beside / top).is_dir() or top.is_dir()):
        looks_local = True  # a mistyped path rather than a hub id
        hint = f"the folder {top} is here, but {given.name} is not in it; {hint}"
    if looks_local:
        raise ParentError(
            f"parent {name!r} does not exist", where=f"{where}.from", got=origin, hint=hint
        )
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(
            origin, revision=revision, allow_patterns=["*.json", "*.safetensors"]
        )
    except Exception as error:
        raise ParentError(
            f"parent {name!r} is neither a folder here nor to be had from the hub",
            where=f"{where}.from",
            got=f"{origin} ({first_line(error)})",
            hint=f"{hint}, or a hub id while online",
        ) from error
    _need_files(name, Path(fetched))
    return Path(fetched)


def _need_files(name: str, folder: Path) -> None:
    needed = ("config.json", "model.safetensors", "preprocessor_config.json")
    missing = [f for f in needed if not (folder / f).is_file()]
    if missing:
        pickled = (
            "pytorch_model.bin is not read: " if (folder / "pytorch_model.bin").is_file() else ""
        )
        raise ParentError(
            f"parent {name!r} lacks {', '.join(missing)}",
            where=str(folder),
            hint=f"{pickled}save the model and its image processor with save_pretrained",
        )


def load_data(spec: Data, beside: Path, image_size: int) -> ImageData:
    """Return the data set of a recipe, cut to its limits."""
    path = spec.path
    if path is not None and (beside / path).exists():
        path = str(beside / path)
    if spec.source == "digits":
        data = load_digits()
    elif spec.source == "fashion-mnist":
        data = load_fashion_mnist(path)
    else:
        assert path is not None
        data = load_hub(
            path,
            config=spec.config,
            folder=spec.source == "imagefolder",
            train_split=spec.train_split,
            test_split=spec.test_split,
            image_column=spec.image_column,
            label_column=spec.label_column,
            image_size=image_size,
        )
    return replace(
        data, train=_cut(data.train, spec.limit.train), test=_cut(data.test, spec.limit.test)
    )


def _cut(split: Split, limit: int | None) -> Split:
    """Return at most `limit` samples: a seeded draw, since many sets are sorted by class."""
    return split if limit is None or limit >= len(split) else split.sample(limit, seed=0)


def image_size(spec: Data, sizes: Mapping[str, int]) -> int | None:
    """Return the input side that the recipe or the existing parents (of `sizes`) ask for."""
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ParentError(
            "the parents have different image sizes",
            where="parents",
            got=listed,
            hint="fuse models that were trained on inputs of one size",
        )
    wanted = next(iter(sizes.values()), None)
    if spec.image_size is not None and wanted is not None and spec.image_size != wanted:
        raise ParentError(
            "the recipe's image size is not the parents'",
            where="data.image_size",
            got=spec.image_size,
            allowed=wanted,
        )
    return spec.image_size or wanted


def common_processor(folders: Mapping[str, Path], data: ImageData, size: int) -> Any:
    """Return the image processor that all parents share, a new one without saved parents."""
    from slimfuse.tasks.image_classification import load_processor, make_processor

    found = {name: load_processor(folder) for name, folder in folders.items()}
    if not found:
        return make_processor(size, data.mean, data.std)
    (first, base), *others = found.items()
    for name, processor in others:
        pairs = [(k, getattr(base, k, None), getattr(processor, k, None)) for k in PROCESSOR_KEYS]
        differing = [f"{k}: {first} has {a}, {name} has {b}" for k, a, b in pairs if a != b]
        if differing:
            raise ParentError(
                "the parents prepare images differently",
                where="preprocessor_config.json",
                got="; ".join(differing),
                hint="fine-tune one of them on the other's preprocessing",
            )
    made = base(images=np.zeros((size, size + 1, 3), np.uint8), return_tensors="np")
    shape = tuple(made["pixel_values"].shape[1:])
    if shape != (3, size, size) or {"height", "width"} - set(dict(base.size)):
        raise ParentError(
            "the image processor makes other images than the model takes",
            where=str(folders[first] / "preprocessor_config.json"),
            got=f"{' × '.join(map(str, shape))}, size {dict(base.size)}",
            allowed=f"3 × {size} × {size}, size {{'height': {size}, 'width': {size}}}",
            hint="save the processor with these sizes beside the model",
        )
    return base
