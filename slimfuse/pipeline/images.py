"""A recipe's images, and the processor that its parents share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimfuse.batch import Batch
from slimfuse.data import ImageData, load_digits, load_fashion_mnist, load_hub, unlabelled
from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Family, ImageFamily
from slimfuse.pipeline.labelling import limited
from slimfuse.pipeline.shaping import shape_of
from slimfuse.recipe import Data, TrainConfig
from slimfuse.tasks import ImageClassification, Task
from slimfuse.tasks.image_classification import CACHE_BYTES, PIXELS
from slimfuse.tasks.image_processors import (
    load_processor,
    make_processor,
    processor_file,
    shown,
    sides,
)

PROCESSOR_KEYS = (
    "size", "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_convert_rgb", "do_center_crop", "crop_size",
)  # fmt: skip
DEFAULT_IMAGE_SIZE = 224


@dataclass(frozen=True)
class Images:
    """What a recipe's images are to its models."""

    data: ImageData
    preprocessor: Any
    size: int
    family: ImageFamily | None = None
    task: Task = field(default_factory=ImageClassification)

    @property
    def orders(self) -> Mapping[str, Mapping[int, int]]:
        """Nothing: images have no tokens with numbers."""
        return {}

    def new_config(
        self, family: Family, spec: TrainConfig, labels: Sequence[str], where: str
    ) -> Any:
        """Return the config of a model that the run trains; raises ShapeError for a bad patch."""
        assert spec.patch_size is not None, "recipes of images have it"
        if self.size % spec.patch_size:
            raise ShapeError(
                "patch_size must divide the image size",
                where=f"{where}.config.patch_size",
                got=f"{spec.patch_size} for images of {self.size} pixels",
                allowed=", ".join(str(d) for d in range(1, self.size + 1) if self.size % d == 0),
            )
        shape = shape_of(spec)
        return family.new_config(
            shape, patch_size=spec.patch_size, image_size=self.size, labels=labels
        )

    def tokens(self, config: Any) -> int:
        """Return how many tokens a model makes of an image."""
        assert self.family is not None, "a plain net has no tokens"
        return self.family.tokens(self._sized(config))

    def flops(self, family: Family, config: Any) -> int:
        """Return the floating-point operations of one image."""
        return family.flops(self._sized(config))

    def _sized(self, config: Any) -> Any:
        """Return a config that says how large these images are, where it may take others."""
        if self.family is None or not self.family.interpolates:
            return config
        sized = copy.copy(config)
        sized.image_size = self.size
        return sized

    @property
    def cached_bytes(self) -> int:
        """Bytes of the images that are kept in memory."""
        height, width = sides(self.preprocessor)
        pixels = 12 * height * width
        parts = (self.data.train, self.data.test)
        return sum(min(len(split) * pixels, CACHE_BYTES) for split in parts)

    @property
    def example(self) -> Batch:
        """Two empty images."""
        return Batch({PIXELS: torch.zeros(2, 3, self.size, self.size)})


def open_images(
    spec: Data,
    family: ImageFamily,
    folders: Mapping[str, Path],
    configs: Mapping[str, Any],
    beside: Path,
    task: Task,
) -> Images:
    """Return a recipe's images and the processor of the models in `folders`.

    configs: of the saved parents; task: whether labels count. Raises ParentError or DataError.
    """
    sizes = {name: c.image_size for name, c in configs.items()}
    if family.interpolates:  # images are as large as the processor makes them
        sizes = {name: sides(load_processor(folders[name]))[0] for name in configs}
    size = image_size(spec, sizes)
    data = load_images(spec, beside, size or DEFAULT_IMAGE_SIZE, labels=task.labelled)
    size = size or data.image_size
    processor = common_processor(folders, data, size)
    return Images(data, processor, size, family, task.of(data))


def load_images(spec: Data, beside: Path, image_size: int, *, labels: bool = True) -> ImageData:
    """Return the images of a recipe, cut to its limits; labels: whether the task needs them."""
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
            labels=labels,
        )
    return limited(data if labels else unlabelled(data), spec)


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
    found = {name: load_processor(folder) for name, folder in folders.items()}
    if not found:
        return make_processor(size, data.mean, data.std)
    (first, base), *others = found.items()
    for name, processor in others:
        pairs = [(k, getattr(base, k, None), getattr(processor, k, None)) for k in PROCESSOR_KEYS]
        differing = [
            f"{k}: {first} has {shown(a)}, {name} has {shown(b)}" for k, a, b in pairs if a != b
        ]
        if differing:
            files = [processor_file(folders[parent]) for parent in (first, name)]
            raise ParentError(
                "the parents prepare images differently",
                where=" and ".join(map(str, files)),
                got="; ".join(differing),
                hint="fine-tune one of them on the other's preprocessing",
            )
    made = base(images=np.zeros((size, size + 1, 3), np.uint8), return_tensors="np")
    shape = tuple(made["pixel_values"].shape[1:])
    if shape != (3, size, size) or sides(base) != (size, size):
        raise ParentError(
            "the image processor makes other images than the model takes",
            where=str(processor_file(folders[first])),
            got=f"{' × '.join(map(str, shape))}, size {shown(base.size)}",
            allowed=f"3 × {size} × {size}, size height {size}, width {size}",
            hint="save the processor with these sizes beside the model",
        )
    return base
