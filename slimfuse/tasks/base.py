"""What a task gives to every stage: prepared samples, answers, losses, figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, call
from slimfuse.data import DataSet, Split
from slimfuse.progress import track
from slimfuse.tasks.criteria import Categorical, Criterion
from slimfuse.tasks.metrics import Measured, Metric

Augmentation = Literal["flip", "shift", "erase", "rand-augment"]
Evidence = dict[str, Tensor]
"""What figures are made of, by name, each (samples, …)."""
Measures = dict[str, Callable[[], Measured]]
"""What computes the figures, by key."""
Answer = Callable[[Batch], Tensor]
"""What a model, of torch or of onnxruntime, says of a batch."""


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

    @property
    def lengths(self) -> Tensor | None:
        """How long each sample is (n,), None where all are of one size."""


class Task(ABC):
    """One task: how its samples are prepared, asked and judged, and what stock tools call it.

    sample: what one sample is called; preprocessor: what prepares it; files: those that the
    preprocessor saves, needed beside a model's weights; auto_model, auto_preprocessor: the stock
    classes that open a folder; output: what the stock class calls its answer; criterion: what
    finetuning minimises; metrics: what is measured, the one that decides first; batch_size: of
    evaluation; cached: whether what teachers say of the whole training set is kept; answers: the
    evidence that holds the rows that count; labelled: whether the data must have labels; by_class:
    whether answers are logits of the data's classes, one of them right; compares: whether figures
    compare with the parents'; joins: whether samples are made of several texts; tag: what
    hubs call the task, where by another name; usage: further lines of Python for a model's card.
    """

    name: str
    sample: str
    preprocessor: str
    files: tuple[str, ...]
    auto_model: str
    auto_preprocessor: str
    output: str = "logits"
    criterion: Criterion = Categorical()
    metrics: tuple[Metric, ...] = (Metric("accuracy"), Metric("macro_f1"))
    batch_size: int = 256
    cached: bool = True
    answers: str = "logits"
    labelled: bool = True
    by_class: bool = True
    compares: bool = False
    joins: bool = False
    tag: str = ""
    usage: str = ""

    @property
    def metric(self) -> Metric:
        """The metric that gates and choices go by."""
        return self.metrics[0]

    def of(self, data: DataSet) -> Task:
        """Return the task as the data set's labels want it."""
        return self

    def marked(self, config: Any) -> Any:
        """Return a config that says what the labels are, where stock classes ask for it."""
        return config

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Return the saved preprocessor of a model's folder; raises ParentError."""

    def save(self, preprocessor: Any, folder: Path) -> None:
        """Write the preprocessor beside a model that was saved before."""
        preprocessor.save_pretrained(folder)

    @abstractmethod
    def identity(self, preprocessor: Any) -> dict[str, Any]:
        """Return all that decides what becomes of a sample and of its answer, as JSON values.

        It is part of every stage's key.
        """

    @abstractmethod
    def samples(self, split: Split, preprocessor: Any, *, uniform: bool = False) -> Samples:
        """Return a split's prepared samples; uniform: all batches are of one size a sample."""

    def examples(
        self, samples: Samples, indices: Tensor, kinds: Sequence[Augmentation] | None = None
    ) -> tuple[Batch, Tensor]:
        """Return the inputs of some samples and their labels (n, …).

        kinds: for training, the random changes that are asked for, by torch's global generator;
        None: for measuring, always the same.
        """
        return samples[indices], samples.labels[indices]

    def rows(self, output: Tensor, inputs: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answers that count (r, …) and their labels (r, …)."""
        return output, labels

    def reduce(self, output: Tensor, inputs: Batch, labels: Tensor) -> Evidence:
        """Return what is kept of a batch's answers, by sample."""
        return {"logits": output, "labels": labels}

    @abstractmethod
    def measures(self, evidence: Evidence, reference: Tensor | None = None) -> Measures:
        """Return how each figure is computed, by key, that of `metric` first.

        reference: `gist` of the parents, where figures compare with it.
        """

    def figures(self, evidence: Evidence, reference: Tensor | None = None) -> dict[str, Measured]:
        """Return all figures by key, see `measures`."""
        return {key: made() for key, made in self.measures(evidence, reference).items()}

    def figure(self, evidence: Evidence, reference: Tensor | None = None) -> Measured:
        """Return the figure of `metric` alone: the others may take long."""
        return self.measures(evidence, reference)[self.metric.key]()

    def gist(self, every: Sequence[Evidence], weights: Sequence[float]) -> Tensor | None:
        """Return what several models' evidence says together, where figures compare with it."""
        return None

    def extras(self, preprocessor: Any, config: Any) -> dict[str, Any]:
        """Return further files of a finished folder, JSON values by path."""
        return {}

    def excerpt(self, batch: Batch) -> Batch:
        """Return a batch small enough for its answers to be kept beside a model."""
        return batch


@torch.no_grad()
def ask(
    answer: Answer,
    task: Task,
    samples: Samples,
    *,
    what: str,
    batch_size: int | None = None,
) -> Evidence:
    """Return the evidence of every sample, in the samples' own order."""
    parts: list[Evidence] = []
    order, done = samples.order, 0
    with track(what, len(samples)) as tell:
        for chunk in torch.split(order, batch_size or task.batch_size):
            inputs, labels = task.examples(samples, chunk)
            parts.append(task.reduce(answer(inputs), inputs, labels))
            done += len(chunk)
            tell(done)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {k: torch.empty_like(v).index_copy_(0, order, v) for k, v in joined.items()}


def answers_of(model: nn.Module, output: str) -> Answer:
    """Return a torch model's float32 answers, computed in its own precision, in evaluation mode."""
    model.eval()
    like = next(model.parameters())

    def answer(inputs: Batch) -> Tensor:
        found: Tensor = getattr(call(model, inputs.to(like.device, like.dtype)), output)
        return found.float().cpu()

    return answer
