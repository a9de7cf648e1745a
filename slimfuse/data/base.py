"""What every data source hands over: labelled images, undecoded until asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Split:
    """Labelled images. `images[i]` is uint8 of shape (height, width, 3); `labels` is (n,)."""

    images: Sequence[Image]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Split:
        """Return the chosen samples, in the given order, without decoding them."""
        if isinstance(self.images, Subset):
            indexed = Subset(self.images.images, self.images.indices[indices])
        else:
            indexed = Subset(self.images, indices)
        return Split(indexed, self.labels[indices])

    def shard(self, index: int, count: int, seed: int = 0) -> Split:
        """Return part `index` (from 1) of `count` disjoint parts of a seeded shuffle."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[index - 1 :: count]))

    def sample(self, size: int, seed: int) -> Split:
        """Return `size` samples (all, if fewer exist) drawn without replacement."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[:size]))


class Subset(Sequence[Image]):
    """A lazy selection of images."""

    def __init__(self, images: Sequence[Image], indices: NDArray[np.int64]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Image:  # type: ignore[override]
        return self.images[int(self.indices[i])]


@dataclass(frozen=True)
class ImageData:
    """A data set with its native size and statistics.

    fingerprint: identifies the content, the same wherever and whenever the same images, labels
        and splits were read. Of a hub's data set it is the mark that `datasets` gives, which
        follows its revision and the library's version.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
