"""Image classification: pixels through the saved processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.data import Split
from slimfuse.errors import ParentError, first_line
from slimfuse.progress import track
from slimfuse.tasks.base import Augmentation

PIXELS = "pixel_values"
CACHE_BYTES = 2 << 30
SHIFT_FRACTION = 1 / 14  # of the image's side: two pixels of 28


def make_processor(image_size: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Return the stock ViT processor that resizes to a square and normalises RGB."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
    )


def load_processor(folder: Path) -> Any:
    """Return the saved image processor of a model folder; raises ParentError."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ParentError(
            "the image processor can't be opened",
            where=str(folder),
            got=first_line(error),
            hint="save it beside the model with processor.save_pretrained",
        ) from error


class Pixels:
    """A split seen through a processor; kept in memory when it takes less than 2 GiB."""

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

    def _bytes(self) -> int:
        side = self.processor.size
        return len(self) * 3 * int(side["height"]) * int(side["width"]) * 4

    def _process(self, indices: Tensor) -> Tensor:
        images = [self.split.items[int(i)] for i in indices]
        out = self.processor(images=images, return_tensors="pt", input_data_format="channels_last")
        pixels: Tensor = out["pixel_values"]
        return pixels


def augment(pixels: Tensor, kinds: Sequence[Augmentation]) -> Tensor:
    """Return randomly flipped and shifted images; uses torch's global generator."""
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
    return pixels


class ImageClassification:
    """Images of one label each."""

    name = "image-classification"
    sample = "image"
    preprocessor = "image processor"
    files: tuple[str, ...] = ("preprocessor_config.json",)
    auto_model = "AutoModelForImageClassification"
    auto_preprocessor = "AutoImageProcessor"

    def load(self, folder: Path) -> Any:
        """Return the saved image processor of a model's folder; raises ParentError."""
        return load_processor(folder)

    def identity(self, preprocessor: Any) -> dict[str, Any]:
        """Return what the processor does with an image."""
        found: dict[str, Any] = json.loads(json.dumps(preprocessor.to_dict(), default=str))
        return found

    def samples(self, split: Split, preprocessor: Any, *, uniform: bool = False) -> Pixels:
        """Return a split's images; all are of one size anyway."""
        return Pixels(split, preprocessor)

    def augment(self, batch: Batch, kinds: Sequence[Augmentation]) -> Batch:
        """Return randomly flipped and shifted images."""
        return Batch({PIXELS: augment(batch.arguments[PIXELS], kinds)}) if kinds else batch
