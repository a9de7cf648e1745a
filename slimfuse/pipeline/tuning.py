"""How a child is finetuned with its teachers: the recipe's `finetune` put to the loop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from slimfuse.families import Layout
from slimfuse.finetune.checkpoint import Progress
from slimfuse.finetune.distill import Fetch, distillation_loss
from slimfuse.finetune.loop import Constraint, Loss, fit
from slimfuse.finetune.lora import adapted
from slimfuse.finetune.schedule import Schedule, steps_of
from slimfuse.pipeline import held_out, streams
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.journal import Journal
from slimfuse.pipeline.protecting import Protecting
from slimfuse.tasks import Samples
from slimfuse.tasks.changes import mixing

if TYPE_CHECKING:
    from slimfuse.pipeline.stages import BaseStages, Stages


def finetune_steps(job: BaseJob, epochs: float | None = None) -> int:
    """Return how many steps the child is finetuned for; epochs: others than the recipe's."""
    spec = job.recipe.finetune
    count = held_out.learnt(job.count("train"), spec.validation)
    return steps_of(count, spec.epochs if epochs is None else epochs, spec.batch_size)


class Tuning:
    """The finetuning of one run."""

    def __init__(self, stages: BaseStages) -> None:
        self.stages, self.job, self.spec = stages, stages.job, stages.job.recipe.finetune

    def inputs(self, kind: str = "fused") -> dict[str, Any]:
        """Return what a training with the teachers depends on, beside its start and its data."""
        teachers, recipe = self.job.teachers, self.job.recipe
        inputs: dict[str, Any] = {
            "finetune": self.spec.model_dump(mode="json"),
            "teachers": [[t.name, t.weight, self.stages.parent(t)[1]] for t in teachers],
            "precision": self.job.precision,
        }
        if self.stages.teaching.mixed(teachers):  # their union is fitted on calibration samples
            inputs["calibration"] = recipe.data.calibration.model_dump(mode="json")
        asked = self.spec.distill.hidden and self.schedule.steps
        if asked and self.stages.method(kind) != "refit":  # a refit brings its own maps
            inputs["streams"] = streams.stage_of(self._declared).key
        changing = self.spec.augment or self.spec.mixup or self.spec.cutmix
        used = {"peft": self.spec.lora, "timm": changing}
        if self.protecting is not None:
            inputs["protected"] = self.protecting.inputs()
        inputs["changed by"] = {name: version(name) for name, why in used.items() if why}
        return inputs

    @cached_property
    def protecting(self) -> Protecting | None:
        """What the fused child must not forget, None where the recipe asks for nothing."""
        return None if self.spec.protect is None else Protecting(self.stages, self.spec.protect)

    @property
    def schedule(self) -> Schedule:
        """Steps and rates."""
        spec = self.spec
        return Schedule(
            finetune_steps(self.job), spec.batch_size, spec.lr, spec.weight_decay, spec.warmup,
            spec.ema, spec.seed, spec.dropout, spec.group_by_length, spec.schedule,
            spec.accumulate, spec.clip, spec.layer_decay,
        )  # fmt: skip

    def run(
        self,
        model: nn.Module,
        checkpoint: Path,
        what: str,
        *,
        kind: str = "fused",
        schedule: Schedule | None = None,
        constraint: Constraint | None = None,
    ) -> Progress:
        """Train a child in place with its teachers, and return how that went.

        kind: the start that it comes from, as `Stages.start` knows it; schedule: another one than
        the recipe's; constraint: what no step may undo.
        """
        plan = self.schedule if schedule is None else schedule
        if not plan.steps:
            return Progress()
        spec, task = self.spec, self.job.task
        if self.protecting is not None and kind == "fused" and constraint is None:
            constraint = self.protecting.constraint(self.stages.start(kind), model)
        if spec.freeze_embeddings:
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.requires_grad_(False)
        samples = self.stages.samples("train")
        hidden = None
        if spec.distill.hidden:
            hidden = streams.taught(self._declared, self.stages.start(kind), model, samples)
        teach = self.stages.teaching.targets(hidden)
        criterion = task.criterion.begun(lambda: self.stages.teaching.first(model, samples, teach))

        def loss_of(fetch: Fetch, smoothing: float = 0.0) -> Loss:
            return distillation_loss(
                task, fetch, teach, temperature=spec.distill.temperature,
                hardness=spec.distill.hardness, criterion=criterion, label_smoothing=smoothing,
                hidden=hidden,
            )  # fmt: skip

        loss = loss_of(self._changed(samples), spec.label_smoothing)
        places = held_out.parts(len(samples), spec.validation, spec.seed)
        judge = None
        if spec.validation is not None and len(places.held_out):
            judge = held_out.validation(
                self.stages, spec.validation, samples, places.held_out,
                loss_of(self.stages.fetch(samples)),
            )  # fmt: skip
        lengths = samples.lengths
        stage = checkpoint.parent.name.removesuffix(".partial").rpartition("-")[0]
        curves = self.job.recipe.runtime.tensorboard
        with self._adapted(model), Journal(self.stages.store, stage, curves=curves) as log:
            return fit(
                model,
                lambda wrapped, indices: loss(wrapped, places.learnt[indices]),
                len(places.learnt),
                plan,
                precision=self.job.precision,
                checkpoint=checkpoint,
                what=what,
                lengths=None if lengths is None else lengths[places.learnt],
                constraint=constraint,
                blocks=self._blocks(),
                validation=judge,
                compiled=spec.compile,
                log=log,
            )

    @property
    def _declared(self) -> Stages:
        """The stages as those of a declared family, whose models have streams."""
        assert isinstance(self.job, Job), "plain nets have no streams: the recipe is checked"
        return cast("Stages", self.stages)

    def _changed(self, samples: Samples) -> Fetch:
        """Return what takes training samples, changed at random as the recipe asks."""
        spec, fetch = self.spec, self.stages.fetch(samples, self.spec.augment)
        if not (spec.mixup or spec.cutmix):
            return fetch
        mix = mixing(spec.mixup, spec.cutmix, len(self.job.data.classes))
        return lambda indices: mix(*fetch(indices))

    def _adapted(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let only adapters be trained, where the recipe asks for that, and the head."""
        spec, layout = self.spec.lora, self._layout()
        if spec is None or layout is None:
            return nullcontext()
        whole = (layout.head,) if layout.head and not layout.tied else ()
        return adapted(
            model, self._blocks(), rank=spec.rank, alpha=spec.alpha, seed=self.spec.seed,
            whole=whole,
        )  # fmt: skip

    def _layout(self) -> Layout | None:
        """Return where the child keeps its parts, None of a plain net."""
        if not isinstance(self.job, Job):
            return None
        found: Layout = self.job.family.layout(self.job.target)
        return found

    def _blocks(self) -> tuple[str, ...]:
        """Return the paths of the child's blocks, where it has any."""
        layout = self._layout()
        return () if layout is None else tuple(block.path for block in layout.blocks)
