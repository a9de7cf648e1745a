"""What each stage of a run makes, and what it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimfuse import __version__
from slimfuse.finetune.distill import distillation_loss, labels_loss, soft_targets
from slimfuse.finetune.loop import Schedule, fit, steps_of
from slimfuse.fuse.baselines import subclone
from slimfuse.fuse.refit import Settings, refit
from slimfuse.fuse.union import Parent
from slimfuse.pipeline.fusion_record import save_fusion
from slimfuse.pipeline.job import Job, ParentJob
from slimfuse.recipe import Train
from slimfuse.store import CHECKPOINT, KEY_LENGTH, Stage, Store, digest
from slimfuse.tasks.image_classification import (
    Measured,
    Pixels,
    accuracy,
    augment,
    logits,
)

EVALUATION_BATCH = 256
LIBRARIES = (
    "torch", "transformers", "accelerate", "safetensors", "numpy", "pillow", "POT", "scikit-learn",
)  # fmt: skip
"""What computes the stages: their versions are part of each address and of the lock."""


@dataclass(frozen=True)
class Outputs:
    """A model's logits on the test set and, where it teaches, on the training set."""

    stage: Stage
    test: Tensor
    train: Tensor | None


class Stages:
    """The stages of one job; each method returns a finished stage, building it if need be."""

    def __init__(self, job: Job, store: Store) -> None:
        self.job, self.store, self.recipe = job, store, job.recipe
        self._pixels: dict[str, Pixels] = {}
        self.base = {
            "slimfuse": __version__,
            "versions": {name: version(name) for name in LIBRARIES},
            "threads": job.threads,
            "processor": _plain(job.processor.to_dict()),
            "data": job.data.fingerprint,
            "limit": [len(job.data.train), len(job.data.test)],
        }

    # -- parents ----------------------------------------------------------------------------

    def parent(self, parent: ParentJob) -> tuple[Path, str]:
        """Return a parent's folder and what its content is known by, training it if asked."""
        if parent.folder is not None:
            content = {"weights": parent.sha256, "config": _config(parent.config)}
            return parent.folder, digest(content)[:KEY_LENGTH]
        assert parent.train is not None
        inputs = self.base | {
            "config": _config(parent.config),
            "train": parent.train.model_dump(mode="json"),
            "precision": self.job.precision,
        }
        train = parent.train
        stage = self.store.stage(
            f"parent-{parent.name}", inputs, lambda folder: self._train(folder, parent, train)
        )
        return stage.path, stage.key

    def _train(self, folder: Path, parent: ParentJob, train: Train) -> None:
        torch.manual_seed(train.seed)
        model = self.job.family.build(parent.config, attention="eager")
        index, count = (int(n) for n in train.shard.split("/"))
        pixels = Pixels(self.job.data.train.shard(index, count), self.job.processor)
        if count == 1:
            pixels = self.pixels("train")
        fit(
            model,
            labels_loss(_batches(pixels, train.augment), pixels.labels, train.label_smoothing),
            len(pixels),
            Schedule(
                steps_of(len(pixels), train.epochs, train.batch_size), train.batch_size, train.lr,
                train.weight_decay, train.warmup, None, train.seed,
            ),
            precision=self.job.precision,
            checkpoint=folder / CHECKPOINT,
            what=f"training parent {parent.name}",
        )  # fmt: skip
        self._save(model, folder)

    def outputs(self, parent: ParentJob) -> Outputs:
        """Return a parent's logits."""
        path, key = self.parent(parent)
        teaches = self._cached_teaching and parent in self.job.teachers

        def build(folder: Path) -> None:
            model = self.job.family.load(path)
            parts = {"test": self.score(model, "test", f"measuring parent {parent.name}")}
            if teaches:
                parts["train"] = self.score(model, "train", f"asking teacher {parent.name}")
            save_file(parts, folder / "logits.safetensors")

        stage = self.store.stage(
            f"outputs-{parent.name}", self.base | {"parent": key, "train": teaches}, build
        )
        loaded = load_file(stage.path / "logits.safetensors")
        return Outputs(stage, loaded["test"], loaded.get("train"))

    # -- the child --------------------------------------------------------------------------

    def start(self, kind: str) -> Stage:
        """Return the model that finetuning starts from: `fused`, `random-start` or `subclone`."""
        parents = [(p, *self.parent(p)) for p in self.job.parents]
        fuse, calibration = self.recipe.fuse, self.recipe.data.calibration
        inputs: dict[str, Any] = self.base | {"target": _config(self.job.target), "kind": kind}
        if kind == "fused":
            inputs |= {
                "fuse": fuse.model_dump(mode="json"),
                "calibration": calibration.model_dump(mode="json"),
            }
        if kind != "random-start":
            inputs["parents"] = [[p.name, p.weight, key] for p, _, key in parents]
        inputs["seed"] = self.recipe.runtime.seed

        def build(folder: Path) -> None:
            torch.manual_seed(self.recipe.runtime.seed)
            model = self.job.family.build(self.job.target)
            if kind == "subclone":
                _, anchor, _ = parents[0]  # a choice by test accuracy would look at the test set
                subclone(self.job.family.load(anchor), model, self.job.family)
            elif kind == "fused":
                loaded = [Parent(p.name, self.job.family.load(f), p.weight) for p, f, _ in parents]
                samples = self.job.data.train.sample(calibration.samples, calibration.seed)
                pixels = Pixels(samples, self.job.processor)
                chunks = [
                    torch.arange(i, min(i + fuse.batch_size, len(pixels)))
                    for i in range(0, len(pixels), fuse.batch_size)
                ]
                fusion = refit(
                    loaded,
                    model,
                    self.job.family,
                    lambda: (pixels[chunk] for chunk in chunks),
                    Settings(
                        stream=fuse.stream,
                        units=fuse.units,
                        ridge=fuse.ridge,
                        reg=fuse.ot.reg if fuse.ot.solver == "sinkhorn" else None,
                    ),
                    n_batches=len(chunks),
                )
                save_fusion(fusion, [p.name for p in loaded], folder)
            self._save(model, folder)

        return self.store.stage(kind, inputs, build)

    def finetune(self, kind: str) -> Stage:
        """Return the model that finetuning with distillation makes of a start."""
        start, spec = self.start(kind), self.recipe.finetune
        teachers = self.job.teachers
        inputs = self.base | {
            "start": start.key,
            "finetune": spec.model_dump(mode="json"),
            "teachers": [[t.name, t.weight, self.parent(t)[1]] for t in teachers],
            "precision": self.job.precision,
        }

        def build(folder: Path) -> None:
            model = self.job.family.load(start.path, attention="eager")
            pixels = self.pixels("train")
            losses = fit(
                model,
                distillation_loss(
                    _batches(pixels, spec.augment),
                    pixels.labels,
                    self._teaching(),
                    temperature=spec.distill.temperature,
                    hardness=spec.distill.hardness,
                ),
                len(pixels),
                self.finetune_schedule,
                precision=self.job.precision,
                checkpoint=folder / CHECKPOINT,
                what=f"finetuning {'the child' if kind == 'fused' else kind}",
            )
            self._save(model, folder)
            (folder / "losses.json").write_text(json.dumps(losses))

        name = "finetuned" if kind == "fused" else f"finetuned-{kind}"
        return self.store.stage(name, inputs, build)

    @property
    def finetune_schedule(self) -> Schedule:
        """Steps and rates of finetuning."""
        spec = self.recipe.finetune
        return Schedule(
            steps_of(len(self.job.data.train), spec.epochs, spec.batch_size), spec.batch_size,
            spec.lr, spec.weight_decay, spec.warmup, spec.ema, spec.seed,
        )  # fmt: skip

    @property
    def _cached_teaching(self) -> bool:
        """Whether the teachers' outputs can be kept: the images are the same in every epoch."""
        return not self.recipe.finetune.augment and self.recipe.finetune.epochs > 0

    def _teaching(self) -> Callable[[Tensor, Tensor], Tensor]:
        temperature = self.recipe.finetune.distill.temperature
        weights = [t.weight for t in self.job.teachers]
        if self._cached_teaching:
            kept = [self.outputs(t).train for t in self.job.teachers]
            soft = soft_targets([k for k in kept if k is not None], weights, temperature)
            return lambda indices, _inputs: soft[indices]
        models = [
            self.job.family.load(self.parent(t)[0], attention="eager") for t in self.job.teachers
        ]

        def ask(_indices: Tensor, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                scores = [m(pixel_values=inputs).logits for m in models]
            return soft_targets(scores, weights, temperature)

        return ask

    def scores(self, stage: Stage) -> Tensor:
        """Return the test logits of a stage's model, through torch."""

        def build(folder: Path) -> None:
            model = self.job.family.load(stage.path)
            test = self.score(model, "test", f"measuring {stage.name}")
            save_file({"test": test}, folder / "logits.safetensors")

        made = self.store.stage(f"scores-{stage.name}", self.base | {"model": stage.key}, build)
        return load_file(made.path / "logits.safetensors")["test"]

    # -- helpers ----------------------------------------------------------------------------

    def pixels(self, part: str) -> Pixels:
        """Return a split seen through the processor, prepared once a run."""
        if part not in self._pixels:
            self._pixels[part] = Pixels(getattr(self.job.data, part), self.job.processor)
        return self._pixels[part]

    def score(self, model: nn.Module, part: str, what: str) -> Tensor:
        """Return a model's logits on a split."""
        return logits(model, self.pixels(part), batch_size=EVALUATION_BATCH, what=what)

    def accuracy(self, scores: Tensor) -> Measured:
        """Return the accuracy of test logits."""
        return accuracy(scores, self.job.data.test.labels)

    def _save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        self.job.processor.save_pretrained(folder)


def _batches(pixels: Pixels, kinds: Any) -> Callable[[Tensor], Tensor]:
    return lambda indices: augment(pixels[indices], kinds)


def _config(config: Any) -> dict[str, Any]:
    return {k: v for k, v in _plain(config.to_diff_dict()).items() if k != "_name_or_path"}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
