"""What the parents teach: goals for the fused head, soft targets for finetuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, call
from slimfuse.families import Layout
from slimfuse.finetune.distill import Teach, told
from slimfuse.fuse.labels import FLOOR, Goals, LabelUnion, Share
from slimfuse.pipeline.common import ParentJob
from slimfuse.pipeline.job import Job
from slimfuse.tasks import Samples

if TYPE_CHECKING:
    from slimfuse.pipeline.stages import BaseStages

OUTSIDE = -1e4  # the logit of a class that a parent doesn't know
BATCH = 256
FIRST = 2048  # training samples that a criterion may look at before the training


def spread(scores: Tensor, places: Sequence[int], classes: int) -> Tensor:
    """Return logits (n, classes) of a parent that knows the classes at `places`."""
    if tuple(places) == tuple(range(classes)):
        return scores
    wide = scores.new_full((len(scores), classes), OUTSIDE)
    wide[:, list(places)] = scores
    return wide


@torch.no_grad()
def answer(model: nn.Module, layout: Layout, inputs: Batch) -> tuple[Tensor, Tensor]:
    """Return a model's logits (n, classes) and what its head reads (n, d)."""
    assert layout.head, "only models with classes are united, and those have a head"
    seen: list[Tensor] = []
    head = model.get_submodule(layout.head)
    handle = head.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    try:
        logits: Tensor = call(model, inputs).logits
    finally:
        handle.remove()
    return logits, seen[0]


class KnownOnly:
    """Goals from one or more parents that leave classes unknown: those get the least probability.

    For a child of such parents alone; its teachers may know more.
    """

    def __init__(self, parents: Sequence[ParentJob], classes: int) -> None:
        self.classes = classes
        total = sum(p.weight for p in parents)
        self.shares: list[Share] = [(torch.tensor(p.places), p.weight / total) for p in parents]

    def __call__(
        self, scores: Sequence[Tensor], features: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return centred log-probabilities (n, classes)."""
        mean = torch.zeros(len(scores[0]), self.classes, dtype=torch.float64)
        for (places, weight), own in zip(self.shares, scores, strict=True):
            logs = torch.full_like(mean, math.log(FLOOR))
            logs[:, places] = torch.log_softmax(own.double(), 1).clamp_min(math.log(FLOOR))
            mean += weight * logs
        return mean - mean.mean(1, keepdim=True)


class Teaching:
    """The teachers of one run.

    Parents of the same classes teach their mean; else they are united by a `LabelUnion`, which is
    fitted on the calibration samples without their labels.
    """

    def __init__(self, stages: BaseStages) -> None:
        self.stages, self.job = stages, stages.job

    @property
    def cached(self) -> bool:
        """Whether the teachers' outputs are kept: images come again, the same each time."""
        spec = self.job.recipe.finetune
        return self.job.task.cached and not spec.augment and spec.epochs > 1

    def mixed(self, parents: Sequence[ParentJob]) -> bool:
        """Whether some of these parents don't know all classes, or in another order."""
        if not self.job.task.by_class:
            return False
        whole = tuple(range(len(self.job.data.classes)))
        return any(p.places != whole for p in parents)

    def goals(self, parents: Sequence[ParentJob], models: Sequence[nn.Module]) -> Goals | None:
        """Return what the fused head shall give, None for the mean of the parents' logits."""
        if not self.mixed(parents):
            return None
        classes = len(self.job.data.classes)
        if {i for p in parents for i in p.places} < set(range(classes)):
            return KnownOnly(parents, classes)
        return self._union(parents, models)

    def _union(self, parents: Sequence[ParentJob], models: Sequence[nn.Module]) -> LabelUnion:
        spec = self.job.recipe.data.calibration
        samples = self.job.data.train.sample(spec.samples, spec.seed)
        prepared = self.stages.prepared(samples)
        answers = [self._answers(p, m, prepared) for p, m in zip(parents, models, strict=True)]
        return LabelUnion.fit(
            [logits for logits, _ in answers],
            [torch.tensor(p.places) for p in parents],
            [p.weight for p in parents],
            classes=len(self.job.data.classes),
            features=[features for _, features in answers],
        )

    def _answers(
        self, parent: ParentJob, model: nn.Module, samples: Samples
    ) -> tuple[Tensor, Tensor]:
        layout = self._layout(parent)
        chunks = torch.arange(len(samples)).split(BATCH)
        parts = [answer(model, layout, samples[chunk]) for chunk in chunks]
        logits, features = (torch.cat(part) for part in zip(*parts, strict=True))
        return logits, features

    def _layout(self, parent: ParentJob) -> Layout:
        assert isinstance(self.job, Job), "only there may parents know other classes"
        return self.job.family.layout(parent.config)

    def targets(self) -> Teach:
        """Return what the teachers say of the rows that count, see `Teach`.

        Answers that are kept were given in the teachers' own precision; those given amid a
        training are in its own: in bf16 in half the time. Where nothing is kept, the function
        holds the loaded models: they are in memory as long as it is.
        """
        temperature = self.job.recipe.finetune.distill.temperature
        teachers, family, task = self.job.teachers, self.job.family, self.job.task
        weights = [t.weight for t in teachers]
        if self.cached and not self.mixed(teachers):
            kept = [self.stages.outputs(t).train for t in teachers]
            every = task.criterion.combine([k for k in kept if k is not None], weights, temperature)
            return lambda indices, _inputs, _labels: every[indices]
        models = [family.load(self.stages.parent(t)[0], attention="eager") for t in teachers]
        if not self.mixed(teachers):

            def say(_indices: Tensor, inputs: Batch, labels: Tensor) -> Tensor:
                answers = [told(task, m, inputs, labels) for m in models]
                with torch.autocast(inputs.device.type, enabled=False):
                    return task.criterion.combine(answers, weights, temperature)

            return say
        union = self._union(teachers, models)
        layouts = [self._layout(t) for t in teachers]

        def unite(_indices: Tensor, inputs: Batch, _labels: Tensor) -> Tensor:
            with torch.autocast(inputs.device.type, enabled=False):
                answers = [answer(m, lay, inputs) for m, lay in zip(models, layouts, strict=True)]
            scores, features = ([a[i].float() for a in answers] for i in (0, 1))
            return union.probabilities(scores, features, temperature=temperature).float()

        if not self.cached:
            return unite
        samples = self.stages.samples("train")
        chunks = torch.arange(len(samples)).split(BATCH)
        soft = torch.cat([unite(chunk, samples[chunk], chunk) for chunk in chunks])
        return lambda indices, _inputs, _labels: soft[indices]

    def first(self, model: nn.Module, samples: Samples, teach: Teach) -> tuple[Tensor, Tensor]:
        """Return the rows of a model and of the teachers on some training samples."""
        task = self.job.task
        generator = torch.Generator().manual_seed(self.job.recipe.finetune.seed)
        some = torch.randperm(len(samples), generator=generator)[:FIRST]
        rows, targets = [], []
        model.eval()
        for chunk in some.split(task.batch_size):
            inputs, labels = task.examples(samples, chunk)
            rows.append(told(task, model, inputs, labels))
            targets.append(teach(chunk, inputs, labels))
        return torch.cat(rows), torch.cat(targets)
