"""What every run has, whatever kind of models it fuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from slimfuse.data import ImageData
from slimfuse.finetune.loop import Precision
from slimfuse.recipe import AnyRecipe, Training

LIBRARIES = (
    "torch", "transformers", "accelerate", "safetensors", "numpy", "pillow", "POT", "scikit-learn",
)  # fmt: skip
"""What computes the stages: their versions are part of each address and of the lock."""


class Kind(Protocol):
    """A kind of models: how they are made, opened and described.

    A model takes `pixel_values=`, returns `.logits` and has `save_pretrained(folder)`.
    """

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model in evaluation mode."""

    def load_config(self, folder: str) -> Any:
        """Return the config of a saved model; raises ParentError."""

    def load(self, folder: str | Path, *, attention: str = "sdpa") -> nn.Module:
        """Return a saved model in evaluation mode, strictly; raises ParentError."""

    def shape(self, config: Any) -> Any:
        """Return the sizes of a model with this config: a dataclass that reads well as text."""

    def flops(self, config: Any) -> int:
        """Return the floating-point operations of one sample (2 per multiply-add)."""


@dataclass(frozen=True)
class ParentJob:
    """A parent that exists (`folder`, sha256 of its weights) or is to be trained (`train`).

    places: of its classes among the data's.
    """

    name: str
    weight: float
    config: Any
    folder: Path | None
    sha256: str | None
    train: Training | None
    places: tuple[int, ...]


@dataclass(frozen=True)
class BaseJob:
    """A recipe whose inputs were opened and fit each other."""

    recipe: AnyRecipe
    path: Path
    family: Kind
    data: ImageData
    processor: Any
    parents: tuple[ParentJob, ...]
    anchor: ParentJob | None
    target: Any
    threads: int
    precision: Precision

    @property
    def libraries(self) -> tuple[str, ...]:
        """What computes the stages of this job."""
        return LIBRARIES

    @property
    def fused(self) -> tuple[ParentJob, ...]:
        """The parents that are fused, as the recipe lists them."""
        names = self.recipe.fuse.parents
        return tuple(p for p in self.parents if names is None or p.name in names)

    @property
    def moves(self) -> bool:
        """Whether a method of the run needs the anchor."""
        return "ot" in (self.recipe.fuse.method, *self.recipe.baselines)

    @property
    def teachers(self) -> tuple[ParentJob, ...]:
        """The parents that teach during finetuning."""
        names = self.recipe.finetune.distill.teachers
        return tuple(p for p in self.parents if names is None or p.name in names)
