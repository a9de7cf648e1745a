"""Image classification: pixels through the saved processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.data import Split
from slimfuse.progress import track
from slimfuse.tasks.base import Augmentation, Evidence, Measures, Samples, Task
from slimfuse.tasks.changes import erase, rand_augment
from slimfuse.tasks.image_processors import load_processor as load_processor
from slimfuse.tasks.image_processors import make_processor as make_processor
from slimfuse.tasks.image_processors import save_processor, sides
from slimfuse.tasks.metrics import accuracy, macro_f1

PIXELS = "pixel_values"
CACHE_BYTES = 2 << 30
SHIFT_FRACTION = 1 / 14  # of the image's side: two pixels of 28


class Pixels:
    """A split seen through a processor; kept in memory when it takes less than 2 GiB."""

    lengths = None

    def __init__(self, split: Split, processor: Any) -> None:
        self.split, self.processor = split, processor
        self.labels = torch.from_numpy(np.ascontiguousarray(split.labels))
        self._cache: Tensor | None = None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def order(self) -> Tensor:
        """Every sample once, as they stand."""
        return torch.arange(len(self))

    def __getitem__(self, indices: Tensor) -> Batch:
        """Return float32 pixels (batch, 3, height, width) of the samples at `indices`."""
        if self._cache is None and self._bytes() <= CACHE_BYTES:
            chunks = torch.split(torch.arange(len(self)), 1024)
            with track("preparing images", len(self)) as tell:
                parts = []
                for chunk in chunks:
                    parts.append(self._process(chunk))
                    tell(int(chunk[-1]) + 1)
            self._cache = torch.cat(parts)
        found = self._process(indices) if self._cache is None else self._cache[indices]
        return Batch({PIXELS: found})

    def changed(self, indices: Tensor) -> Batch:
        """Return pixels of samples that RandAugment has changed before the processor saw them."""
        return Batch({PIXELS: self._process(indices, rand_augment)})

    def _bytes(self) -> int:
        height, width = sides(self.processor)
        return len(self) * 3 * height * width * 4

    def _process(self, indices: Tensor, change: Callable[[list[Any]], list[Any]] = list) -> Tensor:
        images = change([self.split.items[int(i)] for i in indices])
        out = self.processor(images=images, return_tensors="pt", input_data_format="channels_last")
        pixels: Tensor = out["pixel_values"]
        return pixels


def augment(pixels: Tensor, kinds: Sequence[Augmentation]) -> Tensor:
    """Return randomly flipped, shifted and erased images; uses torch's global generator."""
    if "flip" in kinds:
        flips = torch.rand(len(pixels), 1, 1, 1) < 0.5
        pixels = torch.where(flips, pixels.flip(-1), pixels)
    if "shift" in kinds:
        side = pixels.shape[-1]
        reach = max(1, round(side * SHIFT_FRACTION))
        padded = nn.functional.pad(pixels, (reach,) * 4, mode="replicate")
        rows, columns = torch.randint(0, 2 * reach + 1, (2, len(pixels), 1)) + torch.arange(side)
        image = torch.arange(len(pixels))[:, None, None]
        pixels = padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return erase(pixels) if "erase" in kinds else pixels


class ImageTask(Task):
    """A task whose samples are images, prepared by the saved processor."""

    sample = "image"
    preprocessor = "image processor"
    files: tuple[str, ...] = ("preprocessor_config.json",)
    auto_preprocessor = "AutoImageProcessor"

    def load(self, folder: Path) -> Any:
        """Return the saved image processor of a model's folder; raises ParentError."""
        return load_processor(folder)

    def save(self, preprocessor: Any, folder: Path) -> None:
        """Write the processor, in timm's way, too, where the model is timm's."""
        save_processor(preprocessor, folder)

    def identity(self, preprocessor: Any) -> dict[str, Any]:
        """Return what the processor does with an image."""
        found: dict[str, Any] = json.loads(json.dumps(preprocessor.to_dict(), default=str))
        return found

    def samples(self, split: Split, preprocessor: Any, *, uniform: bool = False) -> Pixels:
        """Return a split's images; all are of one size anyway."""
        return Pixels(split, preprocessor)

    def examples(
        self, samples: Samples, indices: Tensor, kinds: Sequence[Augmentation] | None = None
    ) -> tuple[Batch, Tensor]:
        """Return images, randomly changed where that is asked for, and labels."""
        if kinds and "rand-augment" in kinds and isinstance(samples, Pixels):
            inputs, labels = samples.changed(indices), samples.labels[indices]
        else:
            inputs, labels = super().examples(samples, indices)
        if kinds:
            inputs = Batch({PIXELS: augment(inputs.arguments[PIXELS], kinds)})
        return inputs, labels


class ImageClassification(ImageTask):
    """Images of one label each."""

    name = "image-classification"
    auto_model = "AutoModelForImageClassification"

    def measures(self, evidence: Evidence, reference: Tensor | None = None) -> Measures:
        """Return accuracy and macro F1."""
        scores, labels = evidence["logits"], evidence["labels"]
        return {
            "accuracy": lambda: accuracy(scores, labels),
            "macro_f1": lambda: macro_f1(scores, labels),
        }
