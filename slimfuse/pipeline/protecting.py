"""A recipe's `finetune.protect`: which samples, what is kept of them, and how that went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimfuse.batch import Inputs
from slimfuse.data import DataSet, Split
from slimfuse.diagnose.curvature import difference, forecast, measured
from slimfuse.diagnose.isolation import Protection, Subspace, subspaces
from slimfuse.errors import DataError
from slimfuse.pipeline import images, texts
from slimfuse.pipeline.answering import kind_of, reading
from slimfuse.pipeline.calibration import calibration
from slimfuse.pipeline.common import BaseJob
from slimfuse.progress import console, track
from slimfuse.recipe import Calibration, Protect
from slimfuse.recipe.matching import IMAGE_FAMILIES
from slimfuse.report import Finding, words
from slimfuse.store import Stage
from slimfuse.tasks import Samples

if TYPE_CHECKING:
    from slimfuse.pipeline.stages import BaseStages

SPACES, LAYERS, RECORD = "directions.safetensors", "layers.json", "protection.json"
WHERE = "finetune.protect"


@dataclass(frozen=True)
class Old:
    """What must not be forgotten.

    train: samples whose answers are protected; held_out: others of their kind, on which forgetting
    is measured; labels: whether theirs are the model's; fingerprint: of where they come from.
    """

    train: Split
    held_out: Split
    labels: bool
    fingerprint: str
    what: str


def old_samples(job: BaseJob) -> Old | None:
    """Return the samples that a recipe protects, None of one that protects nothing.

    Raises DataError where there are none.
    """
    spec = job.recipe.finetune.protect
    if spec is None:
        return None
    if spec.data is not None:
        data = _open(job, spec)
        same = data.classes == job.data.classes and data.kind == job.data.kind
        parts, what = (data.train, data.test), f"samples of {data.name}"
        old = Old(*parts, same and job.task.labelled, data.fingerprint, what)
    else:
        assert spec.parents is not None, "the recipe is checked"
        known = sorted({i for p in job.parents if p.name in spec.parents for i in p.places})
        train, held_out = (
            split.take(np.flatnonzero(np.isin(split.labels, known)))
            for split in (job.data.train, job.data.test)
        )
        what = f"samples of the {len(known)} classes that {' and '.join(spec.parents)} know"
        old = Old(train, held_out, True, job.data.fingerprint, what)
    if not len(old.train) or not len(old.held_out):
        raise DataError("no sample is left to be protected", where=WHERE, got=old.what)
    return old


def _open(job: BaseJob, spec: Protect) -> DataSet:
    assert spec.data is not None
    beside, labels = job.path.parent, job.task.labelled
    if job.recipe.family in IMAGE_FAMILIES:
        side = getattr(job.target, "image_size", images.DEFAULT_IMAGE_SIZE)
        return images.load_images(spec.data, beside, side, labels=labels)
    return texts.load(spec.data, beside, labels=labels)


class Protecting:
    """The protected answers of one run."""

    def __init__(self, stages: BaseStages, spec: Protect) -> None:
        self.stages, self.job, self.spec = stages, stages.job, spec
        found = old_samples(stages.job)
        assert found is not None
        self.old = found

    def inputs(self) -> dict[str, Any]:
        """Return what the protected subspaces depend on, beside the model."""
        return {
            "protect": self.spec.model_dump(mode="json"),
            "seed": self.job.recipe.data.calibration.seed,
            "samples": self.old.fingerprint,
        }

    def constraint(self, start: Stage, model: nn.Module) -> Protection:
        """Return what holds a training that begins with `model`, the start's, and say it."""
        made = self._stage(start)
        protection = Protection(model, read_spaces(made.path))
        shares = [space.plasticity for space in protection.spaces]
        told = (
            f"  protected: {self.old.what}; {protection.plasticity:.1%} of the weights' directions "
            f"may move ({min(shares):.1%} to {max(shares):.1%} by layer)"
        )
        console.print(told, soft_wrap=True)
        if not protection.plasticity:
            console.print("  nothing can be learnt so: lower finetune.protect.energy or samples")
        return protection

    def _stage(self, start: Stage) -> Stage:
        """Return the stage with what the start's layers read on the protected samples.

        It is kept: so a training that was killed goes on in the very same directions.
        """

        def build(folder: Path) -> None:
            model = self.job.family.load(start.path, attention="eager")
            samples, chunks = self._drawn(self.old.train)
            task, count = self.job.task, sum(map(len, chunks))

            def batches() -> Iterator[Inputs]:
                return (task.examples(samples, chunk)[0] for chunk in chunks)

            with track("reading protected samples", count) as tell:
                spaces = subspaces(model, batches, energy=self.spec.energy, tell=tell)
            write_spaces(spaces, folder)
            shares = {s.layers[0]: round(s.plasticity, 4) for s in spaces}
            self.stages.store.log("protected", "plasticity", samples=count, layers=shares)

        inputs = self.stages.base | {"start": start.key} | self.inputs()
        return self.stages.store.stage("protected", inputs, build)

    def _drawn(self, split: Split) -> tuple[Samples, Sequence[Tensor]]:
        """Return samples of a split, and batches of the places of those that count."""
        job, spec = self.job, self.spec
        draw = Calibration(samples=spec.samples, seed=job.recipe.data.calibration.seed)
        return calibration(
            job.task, split, job.processor, draw, job.recipe.fuse.batch_size,
            lambda: job.task.samples(split, job.processor),
        )  # fmt: skip

    def record(self, start: Stage, model: nn.Module, folder: Path) -> None:
        """Write what became of the protected answers in the training of a start."""
        before = self.job.family.load(start.path, attention="eager")
        model = model.to(next(before.parameters()).device).eval()
        task, kind = self.job.task, kind_of(self.job.task)
        read = reading(task, labels=self.old.labels)

        def batches(split: Split) -> list[tuple[Inputs, Tensor | None]]:
            samples, chunks = self._drawn(split)
            return [task.examples(samples, chunk) for chunk in chunks]

        kept, held_out = batches(self.old.train), batches(self.old.held_out)
        change = difference(before, model)
        _, apart, most = measured(before, model, kept, kind, read)
        told = forecast(before, held_out, change, kind, read)
        rise, gap, _ = measured(before, model, held_out, kind, read)
        spaces = read_spaces(self._stage(start).path)
        found = {
            "what": self.old.what, "energy": self.spec.energy, "labels": self.old.labels,
            "plasticity": Protection(before, spaces).plasticity,
            "layers": [
                {"layers": s.layers, "width": s.width, "rank": s.rank} for s in spaces
            ],
            "largest_change": most, "protected": asdict(apart), "forecast": asdict(told.total),
            "forecast_quadratic": asdict(told.quadratic), "rise": asdict(rise),
            "divergence": asdict(gap),
        }  # fmt: skip
        (folder / RECORD).write_text(json.dumps(found))
        console.print(
            f"  protected answers moved by at most {most:.1e}; on other samples the loss rose by "
            f"{rise.value:.3f}, forecast {told.total.value:.3f}",
            soft_wrap=True,
        )


def write_spaces(spaces: Sequence[Subspace], folder: Path) -> None:
    """Write subspaces as safetensors and JSON."""
    save_file({f"{i}": s.directions for i, s in enumerate(spaces)}, folder / SPACES)
    told = [{"layers": s.layers, "bias": s.bias, "free": s.free} for s in spaces]
    (folder / LAYERS).write_text(json.dumps(told))


def read_spaces(folder: Path) -> tuple[Subspace, ...]:
    """Return what `write_spaces` wrote."""
    tensors, told = load_file(folder / SPACES), json.loads((folder / LAYERS).read_text())
    return tuple(
        Subspace(tuple(one["layers"]), one["bias"], tensors[f"{i}"], one["free"])
        for i, one in enumerate(told)
    )


def findings(stage: Stage) -> tuple[Finding, ...]:
    """Return the report's tables of a training's protected answers, none where none were."""
    file = stage.path / RECORD
    if not file.is_file():
        return ()
    found = json.loads(file.read_text())
    rows = tuple(
        (_listed(one["layers"]), f"{one['rank']}", f"{one['width']}",
         f"{1 - one['rank'] / one['width']:.1%}")
        for one in found["layers"]
    )  # fmt: skip
    layers = Finding(
        "What finetuning was free to change",
        f"Protected: {found['protected']['samples']} {found['what']}, energy {found['energy']:g}; "
        "k of n directions of each layer's inputs are held, 1 − k/n may move.",
        ("layers that read the same", "held k", "of n", "plasticity"),
        rows,
        f"{found['plasticity']:.1%} of the weights' directions could move: "
        + ("lower finetune.protect.energy to learn more, raise it to forget less."
           if found["energy"] < 1 else "with energy 1 the protected answers stay."),
        "protected answers",
    )  # fmt: skip
    rise, told, gap = found["rise"], found["forecast"], found["divergence"]
    loss = "loss" if found["labels"] else "divergence"
    forgot = Finding(
        "What was forgotten",
        f"Other samples of the same kind: {rise['samples']} rows, ± standard error; the forecast "
        "is g·δ + ½ δᵀGδ at the start.",
        ("figure", "value"),
        (
            ("largest change of a protected answer", words.number(found["largest_change"])),
            (f"rise of the {loss}", _estimate(rise)),
            ("its forecast", _estimate(told)),
            ("KL from the answers before, in nats", _estimate(gap)),
        ),
        _verdict(rise, told),
        "protected answers",
    )
    return layers, forgot


def _verdict(rise: dict[str, Any], told: dict[str, Any]) -> str:
    spread = 2 * rise["error"]
    if rise["value"] <= spread:
        return "No forgetting was shown on these samples: the energy could be lowered."
    near = abs(told["value"] - rise["value"]) <= max(spread, 0.5 * abs(rise["value"]))
    return (
        "The old task lost something: raise finetune.protect.energy or samples, or train less. "
        + ("The forecast was near: it can be trusted for other settings."
           if near else "The forecast was off: the change was too large for a quadratic.")
    )  # fmt: skip


def _estimate(found: dict[str, Any]) -> str:
    return f"{words.number(found['value'])} ± {words.number(found['error'])}"


def _listed(layers: Sequence[str]) -> str:
    head = layers[0]
    if len(layers) == 1:
        return head
    return f"{head} + {', '.join(name.rpartition('.')[2] for name in layers[1:])}"
