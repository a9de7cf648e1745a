"""Image classification: pixels through the saved processor, logits, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimfuse.data import Split
from slimfuse.errors import ParentError, first_line
from slimfuse.progress import track

CACHE_BYTES = 2 << 30
SHIFT_FRACTION = 1 / 14  # of the image's side: two pixels of 28
Augmentation = Literal["flip", "shift"]


@dataclass(frozen=True)
class Measured:
    """A proportion with its 95 % Wilson interval over `n` samples."""

    value: float
    low: float
    high: float
    n: int


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

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return float32 pixels (batch, 3, height, width) of the samples at `indices`."""
        if self._cache is None and self._bytes() <= CACHE_BYTES:
            chunks = torch.split(torch.arange(len(self)), 1024)
            with track("preparing images", len(self)) as tell:
                parts = []
                for chunk in chunks:
                    parts.append(self._process(chunk))
                    tell(int(chunk[-1]) + 1)
            self._cache = torch.cat(parts)
        return self._process(indices) if self._cache is None else self._cache[indices]

    def _bytes(self) -> int:
        side = self.processor.size
        return len(self) * 3 * int(side["height"]) * int(side["width"]) * 4

    def _process(self, indices: Tensor) -> Tensor:
        images = [self.split.images[int(i)] for i in indices]
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


@torch.no_grad()
def logits(model: nn.Module, pixels: Pixels, *, batch_size: int = 256, what: str) -> Tensor:
    """Return float32 logits (n, classes) of every sample, in order, in the model's precision."""
    model.eval()
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    out = []
    with track(what, len(pixels)) as tell:
        for chunk in torch.split(torch.arange(len(pixels)), batch_size):
            batch = pixels[chunk].to(device, dtype)
            out.append(model(pixel_values=batch).logits.float().cpu())
            tell(int(chunk[-1]) + 1)
    return torch.cat(out)


def accuracy(scores: NDArray[np.float32] | Tensor, labels: NDArray[np.int64]) -> Measured:
    """Return top-1 accuracy of scores (n, classes) with its 95 % Wilson interval."""
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score

    predicted = np.asarray(scores).argmax(axis=1)
    right = int(accuracy_score(labels, predicted, normalize=False))
    interval = binomtest(right, len(labels)).proportion_ci(method="wilson")
    return Measured(right / len(labels), float(interval.low), float(interval.high), len(labels))
