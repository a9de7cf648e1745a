"""What the parents teach: goals for the fused head, soft targets for finetuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, call
from slimfuse.families import Layout
from slimfuse.finetune.distill import Lesson, Teach, told
from slimfuse.finetune.hidden import Hidden, observing
from slimfuse.fuse.labels import FLOOR, Goals, LabelUnion, Share
from slimfuse.pipeline import lessons
from slimfuse.pipeline.common import ParentJob
from slimfuse.pipeline.job import Job
from slimfuse.recipe import Finetune
from slimfuse.tasks import Samples, Task
from slimfuse.tasks.criteria import Categorical

if TYPE_CHECKING:
    from slimfuse.pipeline.stages import BaseStages

OUTSIDE = -1e4  # the logit of a class that a parent doesn't know
BATCH = 256
Rows = Callable[[Tensor, Batch, list[Tensor]], Tensor]
"""Sample indices, inputs, the answers of those who are asked -> the rows that count."""
FIRST = 2048  # training samples that a criterion may look at before the training


def kept(task: Task, spec: Finetune) -> bool:
    """Whether what teachers say of a sample is kept: it comes again, the same each time."""
    same = not (spec.augment or spec.mixup or spec.cutmix)
    return task.cached and same and spec.epochs > 1


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
        like = next(model.parameters())
        logits: Tensor = call(model, inputs.to(like.device, like.dtype)).logits
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
        """Whether the teachers' outputs are kept."""
        return kept(self.job.task, self.job.recipe.finetune)

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

    def targets(self, hidden: Hidden | None = None) -> Teach:
        """Return what teaches: the rows that count, and streams where `hidden` asks for them.

        Answers that are kept were given in the teachers' own precision; those given amid a
        training are in its own: in bf16 in half the time. Where not all is kept, the function
        holds the loaded models: they are in memory as long as it is. A model that gives both its
        answers and its streams runs once.
        """
        teachers, task = self.job.teachers, self.job.task
        sources = {} if hidden is None else {source.name: source for source in hidden.sources}
        rows, asked = self._rows()
        read = None
        if hidden is not None and self._keeps(hidden):
            read = self._kept(hidden)
            sources = {}
        needed = [p for p in self.job.parents if p in asked or p.name in sources]
        models = {p.name: self._load(p) for p in needed}

        def teach(indices: Tensor, inputs: Batch, labels: Tensor) -> Lesson:
            answers, seen = {}, {}
            for name, model in models.items():
                blocks = sources[name].blocks if name in sources else ()
                with observing(model, blocks) as streams:
                    answers[name] = told(task, model, inputs, labels)
                seen[name] = {k: v.detach() for k, v in streams.items()}
            said = rows(indices, inputs, [answers[t.name] for t in teachers if t in asked])
            if hidden is None:
                return Lesson(said)
            if read is not None:
                return Lesson(said, read(indices, inputs))
            return Lesson(said, hidden.goals([seen[name] for name in sources]))

        return teach

    def _keeps(self, hidden: Hidden) -> bool:
        """Whether hidden states are kept on disk: samples come again, and all fit the limit."""
        return self.cached and lessons.size(self.job) <= lessons.LIMIT

    def _kept(self, hidden: Hidden) -> lessons.Goals:
        """Return goals that are read from disk; the parents are only loaded to make them."""
        parents = {p.name: p for p in self.job.parents}
        models: dict[str, nn.Module] = {}

        def ask(_indices: Tensor, inputs: Batch) -> tuple[Tensor, ...]:
            seen = []
            for source in hidden.sources:
                if source.name not in models:
                    models[source.name] = self._load(parents[source.name])
                model = models[source.name]
                like = next(model.parameters())
                with observing(model, source.blocks) as streams:
                    call(model, inputs.to(like.device, like.dtype))
                seen.append(streams)
            return hidden.goals(seen)

        found = lessons.kept(self.stages, hidden, self.stages.samples("train"), ask)
        models.clear()
        return found

    def _load(self, parent: ParentJob) -> nn.Module:
        """Return a parent's model where the training is."""
        model = self.job.family.load(self.stages.parent(parent)[0], attention="eager")
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _rows(self) -> tuple[Rows, Sequence[ParentJob]]:
        """Return what makes the rows that count of the teachers' answers, and who has to answer."""
        spec, task, teachers = self.job.recipe.finetune, self.job.task, self.job.teachers
        temperature, weights = spec.distill.temperature, [t.weight for t in teachers]
        criterion = task.criterion
        if spec.distill.combine == "confident":
            assert isinstance(criterion, Categorical), "the recipe asks for answers of classes"
            criterion = replace(criterion, confident=True)
        if not self.mixed(teachers):

            def combine(_indices: Tensor, inputs: Batch, answers: list[Tensor]) -> Tensor:
                with torch.autocast(answers[0].device.type, enabled=False):
                    return criterion.combine(answers, weights, temperature)

            if not self.cached:
                return combine, teachers
            kept = [self.stages.outputs(t).train for t in teachers]
            every = criterion.combine([k for k in kept if k is not None], weights, temperature)
            return (lambda indices, _inputs, _answers: every[indices]), ()
        models = [self._load(t) for t in teachers]
        union = self._union(teachers, models)
        layouts = [self._layout(t) for t in teachers]

        def unite(_indices: Tensor, inputs: Batch, _answers: list[Tensor]) -> Tensor:
            with torch.autocast(next(models[0].parameters()).device.type, enabled=False):
                answers = [answer(m, lay, inputs) for m, lay in zip(models, layouts, strict=True)]
            scores, features = ([a[i].float().cpu() for a in answers] for i in (0, 1))
            return union.probabilities(scores, features, temperature=temperature).float()

        if not self.cached:
            return unite, ()
        samples = self.stages.samples("train")
        chunks = torch.arange(len(samples)).split(BATCH)
        soft = torch.cat([unite(chunk, samples[chunk], []) for chunk in chunks])
        return (lambda indices, _inputs, _answers: soft[indices]), ()

    def first(self, model: nn.Module, samples: Samples, teach: Teach) -> tuple[Tensor, Tensor]:
        """Return the rows of a model and of the teachers on some training samples."""
        task = self.job.task
        generator = torch.Generator().manual_seed(self.job.recipe.finetune.seed)
        some = torch.randperm(len(samples), generator=generator)[:FIRST]
        rows, targets = [], []
        model.eval()
        for chunk in some.split(task.batch_size):
            inputs, labels = task.examples(samples, chunk)
            rows.append(told(task, model, inputs, labels).cpu())
            targets.append(teach(chunk, inputs, labels).rows.cpu())
        return torch.cat(rows), torch.cat(targets)
