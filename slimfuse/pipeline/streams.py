"""The maps by which parents teach a child their hidden states, from the fusion or by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimfuse.batch import Batch, token_mask
from slimfuse.finetune.distill import Lesson, Teach, told
from slimfuse.finetune.hidden import Hidden, Source, observing
from slimfuse.fuse.narrowing import narrowing, unite
from slimfuse.fuse.union import Parent
from slimfuse.pipeline.fusion_record import STREAMS_FILE, stream_tensors
from slimfuse.pipeline.starts import settings_of
from slimfuse.store import Stage
from slimfuse.tasks import Samples

if TYPE_CHECKING:
    from slimfuse.pipeline.stages import Stages

TURNED = 512  # training samples that decide a turn


def stage_of(stages: Stages) -> Stage:
    """Return the stage that has the maps for the target, whatever its start is fused by."""
    job, recipe = stages.job, stages.job.recipe
    parents = [(p, *stages.parent(p)) for p in job.by_width]
    inputs = stages.base | {
        "target": job.family.shape(job.target).__dict__,
        "fuse": recipe.fuse.model_dump(mode="json", exclude={"ot": {"anchor"}}),
        "calibration": recipe.data.calibration.model_dump(mode="json"),
        "parents": [[p.name, p.weight, key] for p, _, key in parents],
        "seed": recipe.runtime.seed,
    }

    def build(folder: Path) -> None:
        family = job.family
        loaded = [Parent(p.name, family.load(f), p.weight) for p, f, _ in parents]
        samples, chunks = stages.calibration()
        settings = settings_of(recipe.fuse, recipe.runtime.seed)

        def batches() -> list[Batch]:
            return [job.task.examples(samples, chunk)[0] for chunk in chunks]

        with torch.no_grad():
            union, rows = unite(loaded, job.target, family, batches, settings)
            found = narrowing(union, rows, job.target, family, batches, settings,
                              n_batches=len(chunks))  # fmt: skip
        told = stream_tensors(found.mixes, union.segments, [p.name for p in loaded])
        save_file(told, folder / STREAMS_FILE)

    return stages.store.stage("streams", inputs, build)


def taught(stages: Stages, start: Stage, model: nn.Module, samples: Samples) -> Hidden:
    """Return what the streams of a child that begins as `model` shall be; start: its stage.

    The maps of a refit are used as they are; those of another start are turned to the coordinates
    that it has.
    """
    own = start.path / STREAMS_FILE
    if own.is_file():
        return _hidden(stages, load_file(own))
    made = _hidden(stages, load_file(stage_of(stages).path / STREAMS_FILE))
    return _turned(stages, made, model, samples)


def _hidden(stages: Stages, found: Mapping[str, Tensor]) -> Hidden:
    job = stages.job
    layout = job.family.layout(job.target)
    sources = []
    for parent in job.by_width:
        blocks = tuple(b.path for b in job.family.layout(parent.config).blocks)
        depths = tuple(found[f"depths.{parent.name}"].tolist())
        sources.append(Source(parent.name, blocks, found[f"mix.{parent.name}"], depths))
    return Hidden(
        tuple(block.path for block in layout.blocks),
        tuple(sources),
        job.recipe.finetune.distill.hidden,
        centred=layout.norm_order == "pre" and layout.norm == "layer",
    )


def _turned(stages: Stages, hidden: Hidden, model: nn.Module, samples: Samples) -> Hidden:
    """Return goals in the coordinates of a start that has other ones."""
    task = stages.job.task
    teach: Teach = stages.teaching.targets(hidden)
    generator = torch.Generator().manual_seed(stages.recipe.finetune.seed)
    some = torch.randperm(len(samples), generator=generator)[:TURNED]
    own, goals = [], []
    model.eval()
    for chunk in some.split(task.batch_size):
        inputs, labels = task.examples(samples, chunk)
        with observing(model, hidden.blocks) as seen:
            told(task, model, inputs, labels)
        lesson: Lesson = teach(chunk, inputs, labels)
        mask = token_mask(inputs)
        own.append({place: _rows(x, mask) for place, x in seen.items()})
        goals.append(tuple(_rows(x, mask) for x in lesson.streams))
    return hidden.turned(own, goals)


def _rows(stream: Tensor, mask: Tensor | None) -> Tensor:
    return stream.flatten(0, 1) if mask is None else stream[mask.to(stream.device)]
