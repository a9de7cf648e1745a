"""What every run has, whatever kind of models it fuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from slimfuse.batch import Batch
from slimfuse.data import DataSet, Split
from slimfuse.families import Family
from slimfuse.finetune.loop import Precision
from slimfuse.pipeline.licences import Licences, licences
from slimfuse.recipe import AnyRecipe, TrainConfig, Training
from slimfuse.tasks import Samples, Task

Part = Literal["train", "test"]
LIBRARIES = (
    "torch", "transformers", "accelerate", "safetensors", "numpy", "pillow", "POT", "scikit-learn",
)  # fmt: skip
"""What computes the stages: their versions are part of each address and of the lock."""


class Kind(Protocol):
    """A kind of models: how they are made, opened and described.

    A model takes a `Batch`'s arguments, returns its task's `output` and has `config`.
    """

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model in evaluation mode."""

    def load_config(self, folder: str) -> Any:
        """Return the config of a saved model; raises ParentError."""

    def load(self, folder: str | Path, *, attention: str = "sdpa") -> nn.Module:
        """Return a saved model in evaluation mode, strictly; raises ParentError."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write config.json and model.safetensors."""

    def stock_form(self, model: nn.Module) -> nn.Module:
        """Return the model as its stock class has it, which is exported."""

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
    def task(self) -> Task:
        """The task as the data's labels want it."""

    @property
    def orders(self) -> Mapping[str, Mapping[int, int]]:
        """Where models with other numbers of tokens keep each token, by the models' names."""

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

    sha256: of the weights in the folder or the start; places: of its classes among the data's;
    order: where it keeps each token of the common tokenizer, None where they have its numbers;
    origin: what the recipe says of where it, or what it starts from, is.
    """

    name: str
    weight: float
    config: Any
    folder: Path | None
    sha256: str | None
    train: Training | None
    places: tuple[int, ...]
    start: Path | None = None
    order: Mapping[int, int] | None = None
    origin: str | None = None


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
    made: dict[str, Samples] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def samples(self, part: Part) -> Samples:
        """Return a split seen through the preprocessor, prepared once."""
        if part not in self.made:
            self.made[part] = self.task.samples(getattr(self.data, part), self.processor)
        return self.made[part]

    def count(self, part: Part) -> int:
        """Return how many samples a model sees of a split: texts may be joined."""
        return len(self.samples(part)) if self.task.joins else len(getattr(self.data, part))

    def count_of(self, split: Split) -> int:
        """Return how many samples a model sees of any split."""
        return len(self.task.samples(split, self.processor)) if self.task.joins else len(split)

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
    def licences(self) -> Licences:
        """The licences of what the fused model is made of; what the run trains anew has none."""
        homes = {p.name: (p.folder or p.start, p.origin) for p in self.fused}
        return licences({n: (home, at) for n, (home, at) in homes.items() if home is not None})

    @property
    def moves(self) -> bool:
        """Whether a method of the run needs the anchor."""
        return "ot" in (self.recipe.fuse.method, *self.recipe.baselines)

    @property
    def teachers(self) -> tuple[ParentJob, ...]:
        """The parents that teach during finetuning."""
        names = self.recipe.finetune.distill.teachers
        return tuple(p for p in self.parents if names is None or p.name in names)
