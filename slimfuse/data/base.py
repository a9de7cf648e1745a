"""What every data source hands over: samples and their labels, not decoded until asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Kind = Literal["single", "multi", "regression", "none"]
"""What a sample's label is: a class, any number of classes, a number, nothing."""


@dataclass(frozen=True)
class Split:
    """Samples and their labels.

    items[i]: an `Image` of shape (height, width, 3), or a text; labels: of one class each their
    places, int64 (n,); of several 1 where a class holds, float32 (n, classes); of a number
    float32 (n,); of nothing zeros, int64 (n,).
    """

    items: Sequence[Any]
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Split:
        """Return the chosen samples, in the given order, without decoding them."""
        if isinstance(self.items, Subset):
            indexed = Subset(self.items.items, self.items.indices[indices])
        else:
            indexed = Subset(self.items, indices)
        return Split(indexed, self.labels[indices])

    def shard(self, index: int, count: int, seed: int = 0) -> Split:
        """Return part `index` (from 1) of `count` disjoint parts of a seeded shuffle."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[index - 1 :: count]))

    def sample(self, size: int, seed: int) -> Split:
        """Return `size` samples (all, if fewer exist) drawn without replacement."""
        return self.take(draw(len(self), size, seed))

    def first(self, size: int) -> Split:
        """Return the first `size` samples, all where there are no more."""
        return self if size >= len(self) else self.take(np.arange(size))

    def piece(self, index: int, count: int) -> Split:
        """Return part `index` (from 1) of `count` parts in a row, of the same size but for one."""
        start, stop = (len(self) * i // count for i in (index - 1, index))
        return self.take(np.arange(start, stop))


def draw(count: int, size: int, seed: int) -> NDArray[np.int64]:
    """Return `size` of `count` places (all, if fewer exist), a seeded draw, in order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:size])


class Subset(Sequence[Any]):
    """A lazy selection of samples."""

    def __init__(self, items: Sequence[Any], indices: NDArray[np.int64]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:  # type: ignore[override]
        return self.items[int(self.indices[i])]


@dataclass(frozen=True)
class DataSet:
    """A data set of one kind of samples.

    classes: the names of the labels' places; of a number the one name of what it says; of nothing
        none.
    fingerprint: identifies the content, the same wherever and whenever the same samples, labels
        and splits were read. Of a hub's data set it is the mark that `datasets` gives, which
        follows its revision and the library's version.
    kind: what the labels are.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    fingerprint: str
    kind: Kind = field(default="single", kw_only=True)


@dataclass(frozen=True)
class ImageData(DataSet):
    """Images with their native size and statistics."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class TextData(DataSet):
    """Texts: the items are strings."""


D = TypeVar("D", bound=DataSet)


def unlabelled(data: D) -> D:
    """Return a data set without its labels, for tasks that have none."""
    if data.kind == "none":
        return data
    bare = (Split(split.items, no_labels(len(split))) for split in (data.train, data.test))
    train, test = bare
    mark = hashlib.sha256(f"unlabelled {data.fingerprint}".encode()).hexdigest()
    return replace(data, train=train, test=test, classes=(), fingerprint=mark, kind="none")


def no_labels(count: int) -> NDArray[np.int64]:
    """Return what stands for the labels of samples that have none."""
    return np.zeros(count, dtype=np.int64)
