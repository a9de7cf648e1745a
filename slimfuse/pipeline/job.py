"""From a recipe to checked inputs: everything that can be known to fail fails here, first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from slimfuse_export.environment import cores_allowed, cpu_quota

from slimfuse.data import ImageData, Split, load_digits, load_fashion_mnist, load_hub
from slimfuse.errors import DataError, ParentError, ShapeError, first_line
from slimfuse.families import FAMILIES, Family, Shape
from slimfuse.finetune.loop import Precision, best_precision
from slimfuse.recipe import Data, Parent, Recipe, Target, Train
from slimfuse.store import file_digest

PROCESSOR_KEYS = (
    "size", "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_convert_rgb",
)  # fmt: skip
DEFAULT_IMAGE_SIZE = 224


@dataclass(frozen=True)
class ParentJob:
    """A parent that exists (`folder`, sha256 of its weights) or is to be trained (`train`)."""

    name: str
    weight: float
    config: Any
    folder: Path | None
    sha256: str | None
    train: Train | None


@dataclass(frozen=True)
class Job:
    """A recipe whose inputs were opened and fit each other."""

    recipe: Recipe
    path: Path
    family: Family
    data: ImageData
    processor: Any
    parents: tuple[ParentJob, ...]
    target: Any
    threads: int
    precision: Precision

    @property
    def teachers(self) -> tuple[ParentJob, ...]:
        """The parents that teach during finetuning."""
        names = self.recipe.finetune.distill.teachers
        return tuple(p for p in self.parents if names is None or p.name in names)


def prepare(recipe: Recipe, path: Path) -> Job:
    """Open data and parents and check that they fit each other and the target.

    path: the recipe's file; relative paths in it are looked up beside it, then in the current
    folder. Raises ParentError, DataError or ShapeError; nothing has been written by then.
    """
    family = FAMILIES[recipe.family]
    folders = {p.name: find_parent(p, path.parent) for p in recipe.parents if p.from_ is not None}
    configs = {name: family.load_config(str(folder)) for name, folder in folders.items()}
    size = _image_size(recipe.data, configs)
    data = load_data(recipe.data, path.parent, size or DEFAULT_IMAGE_SIZE)
    size = size or data.image_size
    for parent in recipe.parents:
        if parent.train is not None:
            configs[parent.name] = trained_config(family, parent.train, data, size, parent.name)
    configs = {p.name: configs[p.name] for p in recipe.parents}
    mismatched = family.mismatches(configs)
    if mismatched:
        raise ParentError(
            "the parents don't fit each other", where="parents", got="; ".join(mismatched)
        )
    _check_labels(configs, data)
    widest = max(configs.values(), key=lambda c: family.shape(c).hidden_size)
    target = family.narrow(widest, target_shape(recipe.target, configs, family))
    _check_width(family.shape(target).hidden_size, configs, family)
    if "subclone" in recipe.baselines:
        _check_subclone(target, configs, family)
    processor = _processor(folders, data, size)
    for folder in folders.values():
        family.load(folder)  # strict, and sees a file that was cut off
    _check_shards(recipe, data)
    parents = tuple(
        ParentJob(
            p.name,
            p.weight,
            configs[p.name],
            folders.get(p.name),
            file_digest(folders[p.name] / "model.safetensors") if p.name in folders else None,
            p.train,
        )
        for p in recipe.parents
    )
    runtime = recipe.runtime
    precision = best_precision() if runtime.precision == "auto" else runtime.precision
    return Job(
        recipe, path, family, data, processor, parents, target,
        runtime.threads or cores(), precision,
    )  # fmt: skip


def cores() -> int:
    """Return the processor cores this process may use: those allowed, no more than its quota."""
    quota = cpu_quota()
    return cores_allowed() if quota is None else min(cores_allowed(), max(1, int(quota)))


def find_parent(parent: Parent, beside: Path) -> Path:
    """Return the local folder of a parent, fetching a hub id once; raises ParentError."""
    assert parent.from_ is not None
    given = Path(parent.from_).expanduser()
    for folder in (beside / given, given):
        if folder.is_dir():
            if parent.revision is not None:
                raise ParentError(
                    "a revision goes only with a hub id, and this is a folder here",
                    where=f"parents.{parent.name}.revision",
                    got=parent.revision,
                    hint="remove the key",
                )
            _need_files(parent.name, folder)
            return folder
    hint = "give a folder with config.json, model.safetensors and preprocessor_config.json"
    looks_local = parent.from_.startswith((".", "/", "~")) or parent.from_.count("/") != 1
    top = Path(given.parts[0])
    if not looks_local and ((beside / top).is_dir() or top.is_dir()):
        looks_local = True  # a mistyped path rather than a hub id
        hint = f"the folder {top} is here, but {given.name} is not in it; {hint}"
    if looks_local:
        raise ParentError(
            f"parent {parent.name!r} does not exist",
            where=f"parents.{parent.name}.from",
            got=parent.from_,
            hint=hint,
        )
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(
            parent.from_, revision=parent.revision, allow_patterns=["*.json", "*.safetensors"]
        )
    except Exception as error:
        raise ParentError(
            f"parent {parent.name!r} is neither a folder here nor to be had from the hub",
            where=f"parents.{parent.name}.from",
            got=f"{parent.from_} ({first_line(error)})",
            hint=f"{hint}, or a hub id while online",
        ) from error
    _need_files(parent.name, Path(fetched))
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


def trained_config(family: Family, train: Train, data: ImageData, size: int, name: str) -> Any:
    """Return the config of a parent that the run trains; raises ShapeError for a bad patch."""
    shape = train.config
    if size % shape.patch_size:
        raise ShapeError(
            "patch_size must divide the image size",
            where=f"parents.{name}.train.config.patch_size",
            got=f"{shape.patch_size} for images of {size} pixels",
            allowed=", ".join(str(d) for d in range(1, size + 1) if size % d == 0),
        )
    return family.new_config(
        Shape(
            shape.hidden_size, shape.num_attention_heads, shape.intermediate_size,
            shape.num_hidden_layers,
        ),
        patch_size=shape.patch_size, image_size=size, labels=data.classes,
    )  # fmt: skip


def target_shape(target: Target, configs: Mapping[str, Any], family: Family) -> Shape:
    """Return the target's sizes; ratios are taken of the widest parent's."""
    shapes = [family.shape(c) for c in configs.values()]

    def resolve(value: int | float | None, key: str, default: int | float) -> int:
        chosen = default if value is None else value
        widest = max(getattr(s, key) for s in shapes)
        return max(1, round(chosen * widest)) if isinstance(chosen, float) else chosen

    width = resolve(target.hidden_size, "hidden_size", 1.0)
    ratio = width / max(s.hidden_size for s in shapes)
    return Shape(
        width,
        resolve(target.num_attention_heads, "num_attention_heads", 1.0),
        resolve(target.intermediate_size, "intermediate_size", ratio),
        resolve(target.num_hidden_layers, "num_hidden_layers", 1.0),
    )


def _image_size(spec: Data, configs: Mapping[str, Any]) -> int | None:
    """Return the input side that the recipe or the existing parents ask for."""
    sizes = {name: config.image_size for name, config in configs.items()}
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


def _check_labels(configs: Mapping[str, Any], data: ImageData) -> None:
    for name, config in configs.items():
        labels = [str(v) for _, v in sorted(config.id2label.items(), key=lambda kv: int(kv[0]))]
        generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
        if len(labels) != len(data.classes) or not (generic or tuple(labels) == data.classes):
            raise DataError(
                "the parents' labels are not the data set's",
                where=f"parents.{name}",
                got=f"{len(labels)}: {', '.join(labels[:6])}{', …' if len(labels) > 6 else ''}",
                allowed=f"{len(data.classes)}: {', '.join(data.classes[:6])}"
                f"{', …' if len(data.classes) > 6 else ''}",
                hint="use the data set the parents were fine-tuned on, with its label order",
            )


def _check_width(width: int, configs: Mapping[str, Any], family: Family) -> None:
    first, config = next(iter(configs.items()))
    limit = family.shape(config).hidden_size
    if width > limit:
        raise ShapeError(
            "the target is wider than the first parent, whose stream the others are brought into",
            where="target.hidden_size",
            got=width,
            allowed=f"1 … {limit}, the width of {first}",
            hint="put the widest parent first",
        )


def _check_subclone(target: Any, configs: Mapping[str, Any], family: Family) -> None:
    """Demand that the first parent has enough units everywhere to copy from."""
    first, config = next(iter(configs.items()))
    have, want = family.atlas(config), family.atlas(target)
    short = [
        f"{name}: {have.spaces[name].size} units, the target has {want.spaces[name].size}"
        for name in want.free
        if have.spaces[name].size < want.spaces[name].size
    ]
    if short:
        raise ShapeError(
            f"baseline subclone copies units of the first parent, and {first} has too few",
            where="baselines",
            got="; ".join(short[:3]),
            hint="make the target smaller, put a larger parent first, or leave subclone out",
        )


def _check_shards(recipe: Recipe, data: ImageData) -> None:
    for parent in recipe.parents:
        if parent.train is not None:
            count = int(parent.train.shard.split("/")[1])
            if count > len(data.train):
                raise DataError(
                    "there are fewer training samples than shards",
                    where=f"parents.{parent.name}.train.shard",
                    got=parent.train.shard,
                    allowed=f"up to {len(data.train)} shards",
                )


def _processor(folders: Mapping[str, Path], data: ImageData, size: int) -> Any:
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
