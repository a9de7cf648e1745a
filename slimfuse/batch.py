"""What a model is called with: one tensor, or several by the names of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MASK = "attention_mask"


@dataclass(frozen=True)
class Batch:
    """Inputs of several samples by the names of the model's arguments, each (samples, …).

    `attention_mask` (samples, tokens), where there is one, is 0 at tokens that only pad.
    """

    arguments: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.arguments.values())))

    def __getitem__(self, index: Any) -> Batch:
        """Return the samples at a slice, a list of places or a boolean mask."""
        return Batch({name: value[index] for name, value in self.arguments.items()})

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.arguments.values())).device

    def split(self, size: int) -> list[Batch]:
        """Return parts of at most `size` samples."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Return the batch on a device, its floating-point tensors in `dtype`."""
        return Batch(
            {
                name: value.to(device, dtype if value.is_floating_point() else value.dtype)
                for name, value in self.arguments.items()
            }
        )


Inputs = Tensor | Batch
"""A tensor is the model's first argument."""
Batches = Callable[[], Iterable[Inputs]]
"""Gives the same batches each time it is called."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model makes of its inputs."""
    return model(**inputs.arguments) if isinstance(inputs, Batch) else model(inputs)


def arrays(batch: Batch) -> dict[str, Any]:
    """Return the inputs as numpy arrays by their names, as onnxruntime takes them."""
    return {name: value.numpy() for name, value in batch.arguments.items()}


def token_mask(inputs: Inputs) -> Tensor | None:
    """Return which tokens are real (samples, tokens), None where all are."""
    mask = inputs.arguments.get(MASK) if isinstance(inputs, Batch) else None
    return None if mask is None else mask.bool()
