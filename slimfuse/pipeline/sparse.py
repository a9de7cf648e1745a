"""Zeros in the finetuned model: weights pruned by saliency, and the training that mends the rest.

Two stages for each scorer: what the last step of the schedule leaves, and what has recovered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.data.base import draw
from slimfuse.errors import ShapeError, UserError
from slimfuse.finetune.distill import Fetch, answered, labels_loss
from slimfuse.finetune.schedule import Schedule
from slimfuse.pipeline.common import BaseJob, Kind
from slimfuse.pipeline.stages import BaseStages, Figures, save_training
from slimfuse.pipeline.tuning import finetune_steps
from slimfuse.recipe import Sparsify
from slimfuse.recipe.sparsifying import BY_BLOCK, BY_GRADIENTS, WeightScorer
from slimfuse.saliency.gradients import BatchLoss
from slimfuse.saliency.inverse import Damping
from slimfuse.saliency.losses import Features, own_answers
from slimfuse.saliency.masks import FILE, Masks
from slimfuse.saliency.patterns import Layer, Pattern, parse_pattern, prunable
from slimfuse.saliency.sparsify import sparsify
from slimfuse.saliency.sparsify_spec import Spec
from slimfuse.store import CHECKPOINT, Stage
from slimfuse.tasks import Task
from slimfuse.tasks.criteria import Direction, Several

RECORD = "sparsity.json"
MOST_ODD = 4  # layers that a hint still names
Say = Callable[[str, Figures], None]


@dataclass(frozen=True)
class Thinned:
    """A model pruned by one scorer: as the last step left it, after recovery, and its record."""

    row: str
    scorer: WeightScorer
    pruned: Stage
    stage: Stage
    record: dict[str, Any]


@dataclass(frozen=True)
class Sparse:
    """The sparse child and its controls. before: figures by row, where a recovery followed."""

    child: Thinned
    controls: tuple[Thinned, ...]
    before: Mapping[str, Figures]

    @property
    def every(self) -> tuple[Thinned, ...]:
        """The child and the controls."""
        return (self.child, *self.controls)


def thin(
    stages: BaseStages, dense: Stage, spec: Sparsify, measured: dict[str, Figures], say: Say
) -> Sparse:
    """Return the sparse models made of a dense one; their figures are added to `measured`."""
    made, before = [], {}
    for scorer in (spec.scorer, *spec.compared):
        one = Thinning(stages, spec, scorer).make(dense)
        made.append(one)
        measured[one.row] = stages.figures(stages.evidence(one.stage))
        if recovery_steps(stages.job, spec):
            before[one.row] = stages.figures(stages.evidence(one.pruned))
        what = "sparse" if one.row == "sparse" else f"control {one.row}"
        say(f"{what}, {one.record['sparsity']:.1%} zeros", measured[one.row])
    return Sparse(made[0], tuple(made[1:]), before)


class Thinning:
    """What one scorer makes of a dense model."""

    def __init__(self, stages: BaseStages, spec: Sparsify, scorer: WeightScorer) -> None:
        self.stages, self.job, self.spec, self.scorer = stages, stages.job, spec, scorer
        self.suffix = "" if scorer == spec.scorer else f"-{scorer}"

    def make(self, dense: Stage) -> Thinned:
        """Return the sparse model; its masks lie beside its weights, in both stages."""
        pruned = self._prune(dense)
        record = json.loads((pruned.path / RECORD).read_text())
        return Thinned(f"sparse{self.suffix}", self.scorer, pruned, self._recover(pruned), record)

    def _prune(self, dense: Stage) -> Stage:
        stages, spec, job = self.stages, self.spec, self.job
        settings = spec.model_dump(mode="json", exclude={"controls", "epochs"})
        inputs = stages.base | {
            "start": dense.key,
            "sparsify": settings | {"scorer": self.scorer, "fisher": fisher_of(spec, job.task)},
            "seed": job.recipe.runtime.seed,
        }
        if any(step.steps for step in self._schedules[:-1]):
            inputs |= stages.tuning.inputs() | {
                "steps": [step.steps for step in self._schedules[:-1]]
            }

        ranks = stages.store.team.ranks

        def build(folder: Path) -> None:
            model = self._load(dense)
            chunks = self._chunks() if self.scorer in BY_GRADIENTS else ()
            fetch = stages.fetch(stages.samples("train"))
            found = sparsify(
                model, loss_of(job.task, fetch, fisher_of(spec, job.task)),
                ranks.share(lambda: chunks),
                settings_of(spec, self.scorer, job.recipe.runtime.seed),
                layers=pruned_layers(model, spec), between=self._between(folder),
                checkpoint=folder / CHECKPOINT, reduce=ranks.sum if ranks.of > 1 else None,
                main=ranks.main,
            )  # fmt: skip
            record = {
                "gradients": len(chunks), "sparsity": found.masks.sparsity,
                "layers": [asdict(layer) for layer in found.layers],
                "steps": [asdict(step) for step in found.steps],
            }  # fmt: skip
            if ranks.main:
                self._save(model, found.masks, folder)
                (folder / RECORD).write_text(json.dumps(record, indent=1))

        return stages.store.stage(f"pruned{self.suffix}", inputs, build, together=True)

    def _between(self, folder: Path) -> Callable[[nn.Module, Masks, int], None]:
        """Return the recovery after a step; its checkpoint goes when the next one has begun."""

        def train(model: nn.Module, masks: Masks, step: int) -> None:
            if self.stages.store.team.main:
                for old in (_checkpoint(step - 1), _checkpoint(f"{step - 1}-best")):
                    (folder / old).unlink(missing_ok=True)
            schedule = self._schedules[step - 1]
            what = f"recovering from step {step} of {self.spec.steps}"
            self.stages.tuning.run(
                model, folder / _checkpoint(step), what, schedule=schedule, constraint=masks
            )
            model.eval()

        return train

    def _recover(self, pruned: Stage) -> Stage:
        stages, last = self.stages, self._schedules[-1]
        inputs = stages.base | {"start": pruned.key, "steps": last.steps, "seed": last.seed}

        def build(folder: Path) -> None:
            model, masks = self._load(pruned), Masks.load(pruned.path / FILE)
            what = f"recovering{' the control' if self.suffix else ''} from {self.scorer}"
            done = stages.tuning.run(
                model, folder / CHECKPOINT, what, schedule=last, constraint=masks
            )
            if stages.store.team.main:
                self._save(model, masks, folder)
                save_training(done, folder)

        inputs |= stages.tuning.inputs()
        return stages.store.stage(f"sparse{self.suffix}", inputs, build, together=True)

    @cached_property
    def _schedules(self) -> list[Schedule]:
        """The training after every step: equal parts, what is left over after the last."""
        whole, steps = self.stages.tuning.schedule, self.spec.steps
        total = recovery_steps(self.job, self.spec)
        counts = [total // steps] * (steps - 1)
        counts.append(total - sum(counts))
        return [
            replace(whole, steps=count, seed=whole.seed + place)  # others of the samples first
            for place, count in enumerate(counts, start=1)
        ]

    def _chunks(self) -> tuple[Tensor, ...]:
        """Return the places of the training samples of every gradient."""
        size = self.spec.micro_batch
        count = len(self.stages.samples("train"))
        drawn = draw(count, self.spec.samples * size, self.job.recipe.runtime.seed)
        chunks: tuple[Tensor, ...] = torch.from_numpy(drawn).split(size)
        return chunks

    def _load(self, stage: Stage) -> nn.Module:
        model = self.job.family.load(stage.path, attention="eager")
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _save(self, model: nn.Module, masks: Masks, folder: Path) -> None:
        """Write a model with its masks, and prove that its zeros survive that."""
        self.stages.save(model, folder)
        masks.check(self.job.family.load(folder))
        masks.save(folder / FILE, scorer=self.scorer)


def _checkpoint(step: int | str) -> str:
    return CHECKPOINT.replace(".", f"-{step}.")


def recovery_steps(job: BaseJob, spec: Sparsify) -> int:
    """Return how many steps of training the zeros are made good by, all together."""
    return finetune_steps(job, spec.epochs)


def settings_of(spec: Sparsify, scorer: WeightScorer, seed: int) -> Spec:
    """Return the settings of one scorer's pruning; an update is only made by a block Fisher."""
    relative, absolute = spec.damping.relative, spec.damping.absolute
    damping = Damping(absolute or 0, relative=False) if relative is None else Damping(relative)
    joint = scorer in BY_GRADIENTS if spec.joint is None else spec.joint
    return Spec(
        spec.sparsity, scorer, parse_pattern(spec.pattern), joint,
        spec.update if scorer in BY_BLOCK else "none", spec.block,
        damping, spec.steps, spec.initial, seed=seed,
    )  # fmt: skip


def pruned_layers(model: nn.Module, spec: Sparsify) -> list[Layer]:
    """Return the layers that are pruned.

    Raises UserError or ShapeError at the recipe's key where there are none, or they don't fit the
    pattern.
    """
    pattern = parse_pattern(spec.pattern)
    try:
        layers = prunable(model, only=spec.layers, leave_out=spec.leave_out)
    except UserError as error:
        error.where = "sparsify.layers"
        raise
    try:
        pattern.check(layers)
    except ShapeError as error:
        error.where = "sparsify.pattern"
        odd = [layer.name for layer in layers if not _fits(pattern, layer)]
        error.hint = f"--set 'sparsify.leave_out={json.dumps([*spec.leave_out, *odd])}'"
        if len(odd) > MOST_ODD:
            error.hint = "choose another pattern, or leave these layers out (sparsify.leave_out)"
        raise
    return layers


def _fits(pattern: Pattern, layer: Layer) -> bool:
    try:
        pattern.check([layer])
    except ShapeError:
        return False
    return True


def check_zeros(spec: Sparsify | None, family: Kind, target: Any) -> None:
    """Demand layers that the recipe's pruning can take, before any work; see `pruned_layers`."""
    if spec is not None:
        with torch.device("meta"):
            pruned_layers(family.build(target), spec)


def fisher_of(spec: Sparsify, task: Task) -> str:
    """Return what the gradients are of: "labels" or "own-answers"."""
    return spec.fisher or ("labels" if task.labelled else "own-answers")


def loss_of(task: Task, fetch: Fetch, fisher: str) -> BatchLoss[Tensor]:
    """Return the mean loss of samples, given by their places, over the rows that count.

    Answers are drawn from the rows by torch's seed, which each gradient has its own of; without
    logits the loss is that of random signs of the unit rows.
    """
    if fisher == "labels":
        return labels_loss(task, fetch)
    several = isinstance(task.criterion, Several)

    def loss(model: nn.Module, places: Tensor) -> Tensor:
        inputs, goals = fetch(places)
        rows, _ = answered(task, model, inputs, goals)
        if not len(rows):
            return rows.sum()
        seed = torch.initial_seed()
        if isinstance(task.criterion, Direction):
            return Features(lambda found, _: found, seed)(rows, inputs, None).mean()
        return own_answers(seed, several=several)(rows, inputs, None).mean()

    return loss
