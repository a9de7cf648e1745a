"""What each stage of a run makes, and what it depends on."""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimfuse import __version__
from slimfuse.data import Split
from slimfuse.families.pretrained import begin
from slimfuse.finetune.checkpoint import Progress
from slimfuse.finetune.distill import Fetch, labels_loss
from slimfuse.finetune.loop import fit
from slimfuse.finetune.schedule import Schedule, steps_of
from slimfuse.fuse.union import Parent
from slimfuse.pipeline.calibration import calibration
from slimfuse.pipeline.common import BaseJob, ParentJob, Part
from slimfuse.pipeline.fusion_record import STREAMS_FILE, save_fusion
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.labelling import training_split
from slimfuse.pipeline.starts import METHODS, SHARED, STREAMS, Ingredients
from slimfuse.pipeline.teaching import Teaching, spread
from slimfuse.pipeline.tuning import Tuning
from slimfuse.pipeline.vocabularies import align
from slimfuse.recipe import Training
from slimfuse.saliency.parallel import Processes
from slimfuse.store import CHECKPOINT, KEY_LENGTH, Stage, Store, digest
from slimfuse.tasks import Augmentation, Evidence, Measured, Samples, answers_of, ask

ANSWERS, TRAINING = "answers.safetensors", "training.json"
Figures = dict[str, Measured]
Shared = dict[Part, Samples]
METHOD_OF = {"random-start": "random"}
"""Methods of rows whose name isn't their method's."""


@dataclass(frozen=True)
class Outputs:
    """A model's answers on the test set and, where it teaches, those of the training set's rows."""

    stage: Stage
    test: Evidence
    train: Tensor | None


class BaseStages(ABC):
    """The stages of one job; each method returns a finished stage, building it if need be."""

    def __init__(self, job: BaseJob, store: Store, shared: Shared | None = None) -> None:
        """Take a job and its store; shared: prepared splits of another job on the same data."""
        self.job, self.store, self.recipe = job, store, job.recipe
        self.shared: Shared = {} if shared is None else shared
        self.teaching, self.tuning = Teaching(self), Tuning(self)
        self.base: dict[str, Any] = {
            "slimfuse": __version__,
            "versions": {name: version(name) for name in job.libraries},
            "threads": job.threads,
            "task": [job.task.name, job.task.joins and "cut in a row"],
            "processor": job.task.identity(job.processor),
            "data": job.data.fingerprint,
            "limit": [len(job.data.train), len(job.data.test)],
        }

    # -- parents ----------------------------------------------------------------------------

    def parent(self, parent: ParentJob) -> tuple[Path, str]:
        """Return a parent's folder and what its content is known by, training it if asked."""
        if parent.folder is not None:
            content = {"weights": parent.sha256, "config": config_values(parent.config)}
            key = digest(content)[:KEY_LENGTH]
            return (parent.folder, key) if parent.order is None else self._aligned(parent, key)
        assert parent.train is not None
        inputs = self.base | {
            "config": config_values(parent.config),
            "train": parent.train.model_dump(mode="json", exclude={"start"}),
            "precision": self.job.precision,
        }
        if parent.start is not None:
            inputs["start"] = parent.sha256
        if parent.train.augment:
            inputs["changed by"] = {"timm": version("timm")}
        train = parent.train

        def build(folder: Path) -> None:
            torch.manual_seed(train.seed)
            model = self.job.family.build(parent.config, attention="eager")
            if parent.start is not None:
                begin(model, parent.start)
            self.train(model, train, folder, parent)

        stage = self.store.stage(f"parent-{parent.name}", inputs, build, together=True)
        return stage.path, stage.key

    def _aligned(self, parent: ParentJob, key: str) -> tuple[Path, str]:
        """Return a copy of a saved parent with the common tokenizer's numbers."""
        raise AssertionError("only declared families have tokens")

    def train(self, model: nn.Module, train: Training, folder: Path, parent: ParentJob) -> None:
        """Train a parent's model on labels and save it."""
        split = training_split(train, self.job.data, joined=self.job.task.joins)
        whole = split is self.job.data.train
        samples = self.samples("train") if whole else self.prepared(split)
        fetch = self.fetch(samples, train.augment)
        fit(
            model,
            labels_loss(self.job.task, fetch, train.label_smoothing),
            len(samples),
            Schedule(
                steps_of(len(samples), train.epochs, train.batch_size), train.batch_size, train.lr,
                train.weight_decay, train.warmup, None, train.seed,
            ),
            precision=self.job.precision,
            checkpoint=folder / CHECKPOINT,
            what=f"training {'' if parent is self.job.anchor else 'parent '}{parent.name}",
        )  # fmt: skip
        self.save(model, folder)

    def outputs(self, parent: ParentJob) -> Outputs:
        """Return a parent's answers: on the test set over all classes, else over its own."""
        path, key = self.parent(parent)
        teaches = self.teaching.cached and parent in self.job.teachers
        task = self.job.task

        def build(folder: Path) -> None:
            model = self.job.family.load(path)
            found = self.ask(model, "test", f"measuring parent {parent.name}")
            parts = {f"test.{name}": value for name, value in found.items()}
            if teaches:
                told = self.ask(model, "train", f"asking teacher {parent.name}")
                parts["train"] = told[task.answers]
            save_file(parts, folder / ANSWERS)

        stage = self.store.stage(
            f"outputs-{parent.name}", self.base | {"parent": key, "train": teaches}, build
        )
        loaded = load_file(stage.path / ANSWERS)
        train = loaded.pop("train", None)
        test = {name.removeprefix("test."): value for name, value in loaded.items()}
        if task.by_class:
            test["logits"] = spread(test["logits"], parent.places, len(self.job.data.classes))
        return Outputs(stage, test, train)

    # -- the child --------------------------------------------------------------------------

    @abstractmethod
    def start(self, kind: str) -> Stage:
        """Return the model that finetuning starts from: `fused`, or a baseline by its row name."""

    def method(self, kind: str) -> str:
        """Return the method that makes a start."""
        return self.recipe.fuse.method if kind == "fused" else METHOD_OF.get(kind, kind)

    def finetune(self, kind: str) -> Stage:
        """Return the model that finetuning with distillation makes of a start."""
        start = self.start(kind)

        def build(folder: Path) -> None:
            model = self.job.family.load(start.path, attention="eager")
            what = f"finetuning {'the child' if kind == 'fused' else kind}"
            done = self.tuning.run(model, folder / CHECKPOINT, what, kind=kind)
            self.save(model, folder)
            if self.store.team.main:
                save_training(done, folder)
                protecting = self.tuning.protecting
                if protecting is not None and kind == "fused" and done.losses:
                    protecting.record(start, model, folder)

        name = "finetuned" if kind == "fused" else f"finetuned-{kind}"
        inputs = self.base | {"start": start.key} | self.tuning.inputs(kind)
        return self.store.stage(name, inputs, build, together=True)

    def evidence(self, stage: Stage) -> Evidence:
        """Return what a stage's model says of the test set, through torch."""

        def build(folder: Path) -> None:
            model = self.job.family.load(stage.path)
            save_file(self.ask(model, "test", f"measuring {stage.name}"), folder / ANSWERS)

        made = self.store.stage(f"scores-{stage.name}", self.base | {"model": stage.key}, build)
        return load_file(made.path / ANSWERS)

    def figures(self, evidence: Evidence) -> Figures:
        """Return the figures of what a model says of the test set."""
        return self.job.task.figures(evidence, self._reference)

    def figure(self, evidence: Evidence) -> Measured:
        """Return the one that decides alone."""
        return self.job.task.figure(evidence, self._reference)

    @cached_property
    def _reference(self) -> Tensor | None:
        """What the teachers say together, where figures compare with it."""
        teachers = self.job.teachers if self.job.task.compares else ()
        every = [self.outputs(t).test for t in teachers]
        return self.job.task.gist(every, [t.weight for t in teachers])

    # -- helpers ----------------------------------------------------------------------------

    def samples(self, part: Part) -> Samples:
        """Return a split seen through the preprocessor, prepared once a run."""
        if part not in self.shared:
            self.shared[part] = self.job.samples(part)
        return self.shared[part]

    def prepared(self, split: Split, *, uniform: bool = False) -> Samples:
        """Return any split seen through the preprocessor."""
        return self.job.task.samples(split, self.job.processor, uniform=uniform)

    def calibration(self) -> tuple[Samples, tuple[Tensor, ...]]:
        """Return samples of one size, and in batches the indices of those for calibration."""
        spec, size = self.recipe.data.calibration, self.recipe.fuse.batch_size
        job = self.job
        return calibration(
            job.task, job.data.train, job.processor, spec, size, lambda: self.samples("train")
        )

    def fetch(self, samples: Samples, kinds: Sequence[Augmentation] | None = None) -> Fetch:
        """Return what takes samples by their places; kinds: None for measuring, see `Task`."""
        return lambda indices: self.job.task.examples(samples, indices, kinds)

    def ask(self, model: nn.Module, part: Part, what: str) -> Evidence:
        """Return what a model says of a split."""
        task = self.job.task
        return ask(answers_of(model, task.output), task, self.samples(part), what=what)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a model and its preprocessor, from the main process."""
        if self.store.team.main:
            self.job.family.save(model, folder)
            self.job.task.save(self.job.processor, folder)


class Stages(BaseStages):
    """The stages of a job of a declared family."""

    job: Job

    def _aligned(self, parent: ParentJob, key: str) -> tuple[Path, str]:
        """Return a copy of a saved parent with the common tokenizer's numbers."""
        folder, order, family = parent.folder, parent.order, self.job.family
        assert folder is not None and order is not None

        def build(made: Path) -> None:
            model = align(family, family.load(folder), order, where=f"parents.{parent.name}")
            self.save(model, made)

        inputs = self.base | {"parent": key, "order": sorted(order.items())}
        stage = self.store.stage(f"aligned-{parent.name}", inputs, build)
        return stage.path, stage.key

    def start(self, kind: str) -> Stage:
        """Return the model that finetuning starts from: `fused`, or a baseline by its row name."""
        method, recipe = self.method(kind), self.job.recipe
        used = self.job.fused[:1] if method == "keep" else self.job.by_width
        parents = [(p, *self.parent(p)) for p in used]
        anchor = self.parent(self.job.anchor) if method == "ot" and self.job.anchor else None
        fuse = recipe.fuse.model_copy(update={"method": method})
        calibration = recipe.data.calibration
        inputs = self.base | {"target": config_values(self.job.target), "method": method}
        if method in ("refit", "gauge", "ot", "intra", "select", "random-refit"):
            inputs |= {
                "fuse": fuse.model_dump(mode="json", exclude={"ot": {"anchor"}}),
                "calibration": calibration.model_dump(mode="json"),
                "anchor": anchor and anchor[1],
            }
        if method == "random-refit":
            inputs["of"] = recipe.fuse.method
        if method != "random":
            inputs["parents"] = [[p.name, p.weight, key, p.places] for p, _, key in parents]
        inputs["seed"] = recipe.runtime.seed
        team, together = self.store.team, (method, recipe.fuse.method) in SHARED

        def build(folder: Path) -> None:
            torch.manual_seed(recipe.runtime.seed)
            family = self.job.family
            model = family.build(self.job.target)
            loaded = [Parent(p.name, family.load(f), p.weight) for p, f, _ in parents]
            samples, chunks = self.calibration()
            jobs = [p for p, _, _ in parents]
            given = Ingredients(
                parents=loaded,
                target=model,
                family=family,
                batches=lambda: (self.job.task.examples(samples, chunk)[0] for chunk in chunks),
                n_batches=len(chunks),
                fuse=fuse,
                anchor=lambda: family.load(anchor[0] if anchor else ""),
                goals=lambda: self.teaching.goals(jobs, [q.model for q in loaded]),
                own=recipe.fuse.method,
                scratch=folder,
                seed=recipe.runtime.seed,
                ranks=team.ranks if together else Processes(),
            )
            record = METHODS[method](given)
            maps = record.pop(STREAMS, None)
            if maps is not None and team.main:
                save_file(maps, folder / STREAMS_FILE)
            told = getattr(loaded[0].model, "generation_config", None) if loaded else None
            if told is not None:
                model.generation_config = copy.deepcopy(told)
            if team.main:
                save_fusion(record | {"method": method}, folder)
            self.save(model, folder)

        return self.store.stage(kind, inputs, build, together=together)


def save_training(done: Progress, folder: Path) -> None:
    """Write the loss of every step, and which one's weights were chosen.

    A step that was left out has no loss.
    """
    told = [None if math.isnan(loss) else loss for loss in done.losses]
    (folder / "losses.json").write_text(json.dumps(told))
    chosen = {"step": done.best_step, "value": done.best} if done.best_step else None
    record = {"steps": len(done.losses), "chosen": chosen, "ended_early": done.stopped}
    (folder / TRAINING).write_text(json.dumps(record))


def training_of(stage: Stage) -> dict[str, Any]:
    """Return what `save_training` wrote beside the losses."""
    found: dict[str, Any] = json.loads((stage.path / TRAINING).read_text())
    return found


def config_values(config: Any) -> dict[str, Any]:
    """Return what a config says, as JSON values."""
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else asdict(config)
    return {k: v for k, v in _plain(values).items() if k != "_name_or_path"}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
