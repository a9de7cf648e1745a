"""What every run has, whatever kind of models it fuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from slimfuse.batch import Batch
from slimfuse.data import DataSet
from slimfuse.families import Family
from slimfuse.finetune.loop import Precision
from slimfuse.recipe import AnyRecipe, TrainConfig, Training
from slimfuse.tasks import Task

LIBRARIES = (
    "torch", "transformers", "accelerate", "safetensors", "numpy", "pillow", "POT", "scikit-learn",
)  # fmt: skip
"""What computes the stages: their versions are part of each address and of the lock."""


class Kind(Protocol):
    """A kind of models: how they are made, opened and described.

    A model takes a `Batch`'s arguments, returns `.logits` and has `config`.
    """

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model in evaluation mode."""

    def load_config(self, folder: str) -> Any:
        """Return the config of a saved model; raises ParentError."""

    def load(self, folder: str | Path, *, attention: str = "sdpa") -> nn.Module:
        """Return a saved model in evaluation mode, strictly; raises ParentError."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write config.json and model.safetensors."""

    def shape(self, config: Any) -> Any:
        """Return the sizes of a model with this config: a dataclass that reads well as text."""

    def flops(self, config: Any) -> int:
        """Return the floating-point operations of one sample (2 per multiply-add)."""


class Opened(Protocol):
    """A recipe's data and preprocessor, and what they are to its models."""

    @property
    def data(self) -> DataSet:
        """The data set, cut to the recipe's limits."""

    @property
    def preprocessor(self) -> Any:
        """What prepares its samples, the same for all models."""

    @property
    def cached_bytes(self) -> int:
        """How many bytes of prepared samples are kept in memory."""

    @property
    def example(self) -> Batch:
        """Two samples of a usual size."""

    def new_config(
        self, family: Family, spec: TrainConfig, labels: Sequence[str], where: str
    ) -> Any:
        """Return the config of a model that the run trains from scratch; raises ShapeError."""

    def tokens(self, config: Any) -> int:
        """Return how many tokens a model makes of a usual sample."""

    def flops(self, family: Family, config: Any) -> int:
        """Return the floating-point operations of a usual sample (2 per multiply-add)."""


@dataclass(frozen=True)
class ParentJob:
    """A parent that exists (`folder`) or is to be trained (`train`), maybe from a model in `start`.

    sha256: of the weights in the folder or the start; places: of its classes among the data's.
    """

    name: str
    weight: float
    config: Any
    folder: Path | None
    sha256: str | None
    train: Training | None
    places: tuple[int, ...]
    start: Path | None = None


@dataclass(frozen=True)
class BaseJob:
    """A recipe whose inputs were opened and fit each other."""

    recipe: AnyRecipe
    path: Path
    family: Kind
    task: Task
    data: DataSet
    processor: Any
    parents: tuple[ParentJob, ...]
    anchor: ParentJob | None
    target: Any
    threads: int
    precision: Precision
    opened: Opened

    @property
    def example(self) -> Batch:
        """Two samples of a usual size: what latency is measured on."""
        return self.opened.example

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
