"""What a run will make and need, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slimfuse.errors import StorageError
from slimfuse.finetune.loop import steps_of
from slimfuse.pipeline.common import BaseJob, ParentJob
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.labelling import training_split
from slimfuse.pipeline.shaping import largest_config
from slimfuse.shapes import AXES, Proposal
from slimfuse.store import Store, free_bytes

RUNTIME_BYTES = 1000 << 20  # the libraries and their ONNX exporter: 880 MiB measured with toys


@dataclass(frozen=True)
class Planned:
    """One model of a plan. params: a count; flops: per sample; bytes: float32 weights."""

    name: str
    shape: str
    params: int
    flops: int
    bytes: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """Models, the child last, and estimates of the peak memory and the disk space in bytes.

    proposal: how the child's shape was found, where it had to be; searched: whether a budget or a
    rounded ratio chose it.
    """

    models: tuple[Planned, ...]
    memory: int
    disk: int
    proposal: Proposal | None
    searched: bool


def make_plan(job: Job) -> Plan:
    """Return the plan of a job; counts are exact, memory and disk are estimates."""
    family, recipe = job.family, job.recipe
    needed = (*job.parents, *([job.anchor] if job.anchor and job.moves else []))
    models = [_planned(job, p.name, p.config, steps_for(job, p)) for p in needed]
    steps = steps_of(len(job.data.train), recipe.finetune.epochs, recipe.finetune.batch_size)
    child = _planned(job, "child", job.target, steps)
    largest = max(m.bytes for m in models)
    samples = min(recipe.data.calibration.samples, len(job.data.train))
    widths = [family.shape(p.config).hidden_size for p in job.parents]
    widths.append(family.shape(job.target).hidden_size)
    tokens = job.opened.tokens(job.target)
    streams = 4 * samples * tokens * 2 * sum(widths)
    units = sum(family.shape(p.config).intermediate_size for p in job.parents)
    moments = 8 * 4 * units**2
    rows = 8 * recipe.fuse.batch_size * tokens * 3 * units
    fusing = sum(m.bytes for m in models) + child.bytes + streams + moments + rows
    training = 4 * largest + _activations(job)
    exporting = 6 * largest
    memory = RUNTIME_BYTES + job.opened.cached_bytes + max(fusing, training, exporting)
    models.append(child)
    return Plan(tuple(models), memory, disk_bytes(models), job.proposal, _searched(job))


def disk_bytes(models: Sequence[Planned]) -> int:
    """Return about how many bytes a run with these models, the child last, writes."""
    *others, child = models
    return 3 * sum(m.bytes for m in others) + 12 * child.bytes + (8 << 20)


def check_disk(plan: Plan, store: Store, lock: str) -> None:
    """Raise StorageError when the disk can't hold what the run with this lock will yet write."""
    free = free_bytes(store.root)
    if free + store.used_bytes(lock) < plan.disk:
        raise StorageError(
            "the disk is too full for this run",
            where=str(store.root),
            got=f"{free / 2**20:.0f} MiB free",
            allowed=f"about {plan.disk / 2**20:.0f} MiB",
            hint="free some space, or choose another folder with --out",
        )


def _activations(job: Job) -> int:
    """Return the bytes that the largest training step keeps for its way back."""
    finetune = job.recipe.finetune
    trained = [(job.target, finetune.batch_size)] if finetune.epochs else []
    trained += [(p.config, p.train.batch_size) for p in job.parents if p.train is not None]
    tokens = job.opened.tokens(job.target)
    sizes = [0]
    for config, batch in trained:
        shape = job.family.shape(config)
        a_token = 24 * shape.hidden_size + 2 * shape.num_attention_heads * tokens  # scores, softmax
        sizes.append(4 * batch * tokens * a_token * shape.num_hidden_layers)
    return max(sizes)


def steps_for(job: BaseJob, model: ParentJob) -> int:
    """Return how many steps a parent or the anchor is trained for."""
    train = model.train
    if train is None:
        return 0
    return steps_of(len(training_split(train, job.data)), train.epochs, train.batch_size)


def _searched(job: Job) -> bool:
    target, family = job.recipe.target, job.family
    top = family.shape(largest_config({p.name: p.config for p in job.parents}, family))
    wished = [(getattr(target, axis), axis) for axis in AXES]
    return target.budget is not None or any(
        abs(wish * getattr(top, axis) - getattr(job.proposal.shape, axis)) > 1e-9
        for wish, axis in wished
        if isinstance(wish, float)
    )


def _planned(job: Job, name: str, config: object, steps: int) -> Planned:
    with torch.device("meta"):
        params = sum(p.numel() for p in job.family.build(config).parameters())
    shape = str(job.family.shape(config))
    return Planned(name, shape, params, job.opened.flops(job.family, config), 4 * params, steps)
