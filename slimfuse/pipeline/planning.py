"""What a run will make and need, before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slimfuse.errors import StorageError
from slimfuse.families import Family
from slimfuse.finetune.schedule import steps_of
from slimfuse.fuse.cache import MEMORY_LIMIT
from slimfuse.pipeline.common import BaseJob, ParentJob
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.labelling import training_split
from slimfuse.pipeline.lessons import LIMIT, size
from slimfuse.pipeline.shaping import largest_config
from slimfuse.pipeline.sparse import recovery_steps, settings_of
from slimfuse.pipeline.teaching import kept
from slimfuse.pipeline.tuning import finetune_steps
from slimfuse.recipe import Recipe, Sparsify
from slimfuse.recipe.sparsifying import BY_BLOCK, BY_GRADIENTS
from slimfuse.report import Cells, tables_fragment, words
from slimfuse.saliency.fisher import HELD, MEMORY
from slimfuse.shapes import AXES, HEADER, Proposal
from slimfuse.store import LOCK, Store, free_bytes
from slimfuse.tasks import LanguageTask, Task

RUNTIME_BYTES = 1650 << 20  # the libraries, ONNX exporter, pictures: 1 080 to 1 490 MiB measured
ZEROS = 14  # what pruning keeps beside the Fisher's sums, in weights of float32
ANSWERS = 3  # what onnxruntime keeps of logits, in logits: 2.4 to 2.7 measured at 30 000 tokens


COLUMNS = ("model", "shape", "params", "FLOPs a sample", "float32 size", "training steps")


@dataclass(frozen=True)
class Planned:
    """One model of a plan. params: a count; flops: per sample; bytes: float32 weights."""

    name: str
    shape: str
    params: int
    flops: int
    bytes: int
    steps: int


_NOTHING = Planned("", "", 0, 0, 0, 0)


@dataclass(frozen=True)
class Plan:
    """Models, the child last, and estimates of the peak memory and the disk space in bytes.

    proposal: how the child's shape was found, where it had to be; searched: whether a budget or a
    rounded ratio chose it; notes: what the figures leave out.
    """

    models: tuple[Planned, ...]
    memory: int
    disk: int
    proposal: Proposal | None
    searched: bool
    notes: tuple[str, ...] = ()

    @property
    def tables(self) -> tuple[Cells, ...]:
        """The models and, where they were searched, the shapes for the child, ready to read."""
        needs = (
            f"peak memory, estimated: {words.size(self.memory)}   "
            f"disk, estimated: {words.size(self.disk)}"
        )
        rows = [
            [m.name, m.shape, words.count(m.params), words.count(m.flops), words.size(m.bytes),
             str(m.steps) if m.steps else "–"]
            for m in self.models
        ]  # fmt: skip
        models = Cells(list(COLUMNS), rows, needs)
        if self.proposal is None or not self.searched:
            return (models,)
        shapes = [list(row) for row in self.proposal.rows()]
        return models, Cells(list(HEADER), shapes, "Shapes for the child")

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the models, what they need, the shapes that were tried."""
        notes = (*(self.proposal.notes if self.proposal is not None else ()), *self.notes)
        return tables_fragment("Plan", (), self.tables, warnings=notes)


@dataclass(frozen=True)
class Outset:
    """What a plan is made of.

    parents: their configs by name, all that are there before the child; fused: the names of those
    but for the anchor; steps: of training, by name and of "child"; samples: for calibration;
    tokens: of a usual sample; flops: of one, by config; cached: bytes of prepared samples;
    lessons: of hidden states that are kept.
    """

    recipe: Recipe
    family: Family
    task: Task
    parents: Mapping[str, Any]
    fused: tuple[str, ...]
    proposal: Proposal
    target: Any
    steps: Mapping[str, int]
    samples: int
    tokens: int
    flops: Callable[[Any], int]
    cached: int
    lessons: int = 0


def make_plan(job: Job) -> Plan:
    """Return the plan of a job; counts are exact, memory and disk are estimates."""
    recipe = job.recipe
    needed = (*job.parents, *([job.anchor] if job.anchor and job.moves else []))
    steps = {p.name: steps_for(job, p) for p in needed}
    steps["child"] = child_steps(job)
    return plan_of(
        Outset(
            recipe, job.family, job.task, {p.name: p.config for p in needed},
            tuple(p.name for p in job.parents), job.proposal, job.target, steps,
            min(recipe.data.calibration.samples, job.count("train")),
            job.opened.tokens(job.target), lambda c: job.opened.flops(job.family, c),
            job.opened.cached_bytes, lesson_bytes(job),
        )
    )  # fmt: skip


def plan_of(given: Outset) -> Plan:
    """Return the plan that something comes to; counts are exact, memory and disk are estimates."""
    family, recipe = given.family, given.recipe
    models = {name: _planned(given, name, config) for name, config in given.parents.items()}
    child = _planned(given, "child", given.target)
    every = [*models.values(), child]
    largest = max(m.bytes for m in every)
    shapes = [family.shape(given.parents[name]) for name in given.fused]
    widths = sum(s.hidden_size for s in shapes) + family.shape(given.target).hidden_size
    streams = 4 * given.samples * given.tokens * 2 * widths
    units = sum(s.intermediate_size for s in shapes)
    moments = 8 * 4 * units**2
    rows = 8 * recipe.fuse.batch_size * given.tokens * 3 * units
    held = min(streams, MEMORY_LIMIT)
    fusing = sum(m.bytes for m in every) + held + moments + rows
    exporting = 6 * largest
    needed = max(
        fusing,
        _training(given, models, child),
        exporting,
        _answering(given),
        zeros_memory(recipe.sparsify, child.bytes),
    )
    memory = RUNTIME_BYTES + given.cached + needed
    disk = (
        disk_bytes(every)
        + given.lessons
        + streams
        - held
        + zeros_disk(recipe.sparsify, child.bytes)
    )
    notes = zeros_notes(recipe.sparsify)
    return Plan(tuple(every), memory, disk, given.proposal, _searched(given), notes)


def lesson_bytes(job: BaseJob) -> int:
    """Return the bytes of the parents' hidden states that finetuning keeps on disk."""
    spec = job.recipe.finetune
    wanted = spec.distill.hidden and kept(job.task, spec)
    taken = size(job) if wanted else 0
    return taken if taken <= LIMIT else 0


def child_steps(job: BaseJob) -> int:
    """Return how many steps the child is trained for, its recovery from pruning included."""
    sparse, steps = job.recipe.sparsify, finetune_steps(job)
    return steps + (recovery_steps(job, sparse) if sparse is not None else 0)


def zeros_memory(spec: Sparsify | None, model: int) -> int:
    """Return the bytes that pruning a model of so many bytes takes at its peak.

    In weights: the model, its gradient and new weights 1 each, scores and their joint ranking in
    float64 2 each, the checkpoint a copy of what it holds; the Fisher's sums up to `Spec.memory`.
    """
    if spec is None:
        return 0
    block, gradients = spec.block or 2**62, spec.samples
    used = {spec.scorer, *spec.compared}
    sums = min(block + HELD, gradients) if used & set(BY_BLOCK) else 2
    return ZEROS * model + min(MEMORY, sums * model)


def zeros_disk(spec: Sparsify | None, model: int) -> int:
    """Return about how many bytes the stages of sparse models write."""
    if spec is None:
        return 0
    stages, checkpoint, dense_onnx = 2 * (1 + len(spec.compared)), 8, 2
    return (stages + checkpoint + dense_onnx) * model


def zeros_notes(spec: Sparsify | None) -> tuple[str, ...]:
    """Return what a plan says of the pruning."""
    if spec is None:
        return ()
    zeros = settings_of(spec, spec.scorer, 0).final
    told = f"sparsify: {zeros:.0%} zeros by {spec.scorer}"
    if spec.scorer in BY_GRADIENTS:
        told += f", {spec.samples} gradients"
    if spec.steps > 1:
        told += f" in each of {spec.steps} steps"
    if spec.compared:
        told += f"; controls with as many steps again: {', '.join(spec.compared)}"
    return (f"{told}. The child's training steps include the recovery.",)


def disk_bytes(models: Sequence[Planned]) -> int:
    """Return about how many bytes a run with these models, the child last, writes."""
    *others, child = models
    return 3 * sum(m.bytes for m in others) + 12 * child.bytes + (8 << 20)


def joint(plans: Sequence[Plan], trials: int = 0) -> Plan:
    """Return the plan of several runs that share their parents, as far as memory and disk go.

    trials: of a search, each of which leaves its model as it was fused and finetuned.
    """
    parents = [disk_bytes([*plan.models[:-1], _NOTHING]) for plan in plans]
    disk = max(parents) + sum(p.disk - own for p, own in zip(plans, parents, strict=True))
    disk += trials * 2 * max(plan.models[-1].bytes for plan in plans)
    return replace(plans[0], memory=max(plan.memory for plan in plans), disk=disk)


def check_disk(plan: Plan, store: Store, lock: str, name: str = LOCK) -> None:
    """Raise StorageError when the disk can't hold what the run with this lock will yet write.

    name: of the file that holds the lock.
    """
    free = free_bytes(store.root)
    if free + store.used_bytes(lock, name) < plan.disk:
        raise StorageError(
            "the disk is too full for this run",
            where=str(store.root),
            got=f"{free / 2**20:.0f} MiB free",
            allowed=f"about {plan.disk / 2**20:.0f} MiB",
            hint="free some space, or choose another folder with --out",
        )


def _training(given: Outset, models: Mapping[str, Planned], child: Planned) -> int:
    """Return the bytes of the largest training: weights, gradients, AdamW's two moments, a step's.

    Beside the child its teachers are in memory, all of them where what they say isn't kept.
    """
    recipe = given.recipe
    named = recipe.finetune.distill.teachers
    teachers = given.fused if named is None else named
    sizes = [models[name].bytes for name in teachers]
    beside = max(sizes, default=0) if kept(given.task, recipe.finetune) else sum(sizes)
    found = [0]
    if recipe.finetune.epochs or (recipe.sparsify is not None and recipe.sparsify.epochs):
        step = _activations(given, given.target, recipe.finetune.batch_size, len(teachers))
        found.append(4 * child.bytes + beside + step)
    for p in recipe.parents:
        if p.train is not None:
            step = _activations(given, given.parents[p.name], p.train.batch_size)
            found.append(4 * models[p.name].bytes + step)
    return max(found)


def _activations(given: Outset, config: Any, batch: int, teachers: int = 0) -> int:
    """Return the bytes that a training step keeps for its way back, teachers' answers too."""
    shape, tokens = given.family.shape(config), given.tokens
    a_token = 24 * shape.hidden_size + 2 * shape.num_attention_heads * tokens  # scores, softmax
    kept = batch * tokens * a_token * shape.num_hidden_layers
    if isinstance(given.task, LanguageTask):
        kept += round(_copies(given.task, teachers) * batch * tokens * int(config.vocab_size))
    return 4 * kept


def _copies(task: LanguageTask, teachers: int) -> float:
    """Return how many tensors as large as all logits a training step has at its peak.

    The logits and their gradient; and of the tokens that count the rows, their softmax, what the
    teachers say, its softmax, sum and next term. Measured with GPT-2, Llama and BERT, 30 000
    tokens: 3.4 without teachers, 6.5 with one or two, 8.4 with three, 1.4 where words are masked.
    """
    counted = getattr(task, "share", 1.0)
    return 2 + counted * (4 + teachers if teachers else 2)


def _answering(given: Outset) -> int:
    """Return the bytes of the largest logits over a vocabulary that are measured or timed.

    The ONNX files are measured one by one, but all of them are open while they are timed.
    """
    if not isinstance(given.task, LanguageTask):
        return 0
    files = len(given.fused) + (1 if given.recipe.export.quantize.mode == "none" else 2)
    samples = max(given.task.batch_size, max(given.recipe.bench.batch) * files)
    rows = max(int(c.vocab_size) for c in (*given.parents.values(), given.target))
    return 4 * ANSWERS * samples * given.tokens * rows


def steps_for(job: BaseJob, model: ParentJob) -> int:
    """Return how many steps a parent or the anchor is trained for."""
    train = model.train
    if train is None:
        return 0
    split = training_split(train, job.data, joined=job.task.joins)
    return steps_of(job.count_of(split), train.epochs, train.batch_size)


def _searched(given: Outset) -> bool:
    target, family = given.recipe.target, given.family
    top = family.shape(largest_config({n: given.parents[n] for n in given.fused}, family))
    wished = [(getattr(target, axis), axis) for axis in AXES]
    return target.budget is not None or any(
        abs(wish * getattr(top, axis) - getattr(given.proposal.shape, axis)) > 1e-9
        for wish, axis in wished
        if isinstance(wish, float)
    )


def _planned(given: Outset, name: str, config: Any) -> Planned:
    with torch.device("meta"):
        params = sum(p.numel() for p in given.family.build(config).parameters())
    shape = str(given.family.shape(config))
    return Planned(name, shape, params, given.flops(config), 4 * params, given.steps.get(name, 0))
