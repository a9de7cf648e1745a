"""What a task gives to every stage: prepared samples, outputs, a measure with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimfuse.batch import Batch, call
from slimfuse.data import Split
from slimfuse.progress import track

Augmentation = Literal["flip", "shift"]


@dataclass(frozen=True)
class Measured:
    """A proportion with its 95 % Wilson interval over `n` samples."""

    value: float
    low: float
    high: float
    n: int


class Samples(Protocol):
    """A split seen through a preprocessor."""

    labels: Tensor

    def __len__(self) -> int:
        """Return how many samples there are."""

    def __getitem__(self, indices: Tensor) -> Batch:
        """Return the inputs of the samples at `indices`."""

    @property
    def order(self) -> Tensor:
        """Every sample once, in the order in which batches waste least."""


class Task(Protocol):
    """One task: how its samples are prepared and what stock tools call its parts.

    sample: what one sample is called; preprocessor: what prepares it; files: those that the
    preprocessor saves, needed beside a model's weights; auto_model, auto_preprocessor: the stock
    classes that open a folder.
    """

    name: str
    sample: str
    preprocessor: str
    files: tuple[str, ...]
    auto_model: str
    auto_preprocessor: str

    def load(self, folder: Path) -> Any:
        """Return the saved preprocessor of a model's folder; raises ParentError."""

    def identity(self, preprocessor: Any) -> dict[str, Any]:
        """Return all that decides what the preprocessor makes of a sample, as JSON values."""

    def samples(self, split: Split, preprocessor: Any, *, uniform: bool = False) -> Samples:
        """Return a split's prepared samples; uniform: all batches are of one size a sample."""

    def augment(self, batch: Batch, kinds: Sequence[Augmentation]) -> Batch:
        """Return randomly changed inputs; uses torch's global generator."""


@torch.no_grad()
def logits(model: nn.Module, samples: Samples, *, batch_size: int = 256, what: str) -> Tensor:
    """Return float32 logits (n, classes) of every sample, in order, in the model's precision."""
    model.eval()
    like = next(model.parameters())
    parts, order, done = [], samples.order, 0
    with track(what, len(samples)) as tell:
        for chunk in torch.split(order, batch_size):
            batch = samples[chunk].to(like.device, like.dtype)
            parts.append(call(model, batch).logits.float().cpu())
            done += len(chunk)
            tell(done)
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, order, found)


def accuracy(scores: NDArray[np.float32] | Tensor, labels: NDArray[np.int64]) -> Measured:
    """Return top-1 accuracy of scores (n, classes) with its 95 % Wilson interval."""
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score

    predicted = np.asarray(scores).argmax(axis=1)
    right = int(accuracy_score(labels, predicted, normalize=False))
    interval = binomtest(right, len(labels)).proportion_ci(method="wilson")
    return Measured(right / len(labels), float(interval.low), float(interval.high), len(labels))
