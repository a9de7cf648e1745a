"""What a run makes and measures before its latencies: the story of the models, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from slimfuse import __version__
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.deployment import DENSE, Deployment, File, batch_of
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.lock import provenance
from slimfuse.pipeline.nets_job import NetJob
from slimfuse.pipeline.nets_stages import NetStages
from slimfuse.pipeline.package import build_package, model_card
from slimfuse.pipeline.passages import find_passages
from slimfuse.pipeline.planning import Plan
from slimfuse.pipeline.quantizing import quantise
from slimfuse.pipeline.results import Measurements
from slimfuse.pipeline.sparse import Sparse, thin
from slimfuse.pipeline.sparse_report import card, measure_files
from slimfuse.pipeline.stages import METHOD_OF, BaseStages, Figures, Shared, Stages, training_of
from slimfuse.pipeline.why import why
from slimfuse.progress import console
from slimfuse.store import Stage, Store
from slimfuse.tasks import Metric

CONTROL = "random-refit"
"""The control that stands beside every refit's one-shot figure."""


@dataclass(frozen=True)
class Trained:
    """The child as it was fused and finetuned; sparse: what was pruned of it."""

    fused: Stage
    finetuned: Stage
    sparse: Sparse | None
    control: Stage | None

    @property
    def child(self) -> Stage:
        """What ships."""
        return self.finetuned if self.sparse is None else self.sparse.child.stage


@dataclass(frozen=True)
class Made:
    """A run but for its latencies and report.

    files: ONNX files to be timed, by row, each with what its content is known by; found: all else
    that was measured.
    """

    store: Store
    deployment: Deployment
    package: Stage
    files: Mapping[str, File]
    found: Measurements


def stages_of(job: BaseJob, store: Store, shared: Shared | None = None) -> BaseStages:
    """Return the stages of a job; shared: prepared splits of another job on the same data."""
    if isinstance(job, NetJob):
        return NetStages(job, store, shared)
    assert isinstance(job, Job)
    return Stages(job, store, shared)


def has_control(job: BaseJob) -> bool:
    """Whether the start is refitted, and what that makes of a random model isn't asked anyway."""
    fuse = job.recipe.fuse
    refits = fuse.method == "refit" or (fuse.method == "gauge" and getattr(fuse, "refit", True))
    return refits and CONTROL not in job.recipe.baselines


def train(stages: BaseStages, measured: dict[str, Figures], *, control: bool = True) -> Trained:
    """Return the child of a job; its figures are added to `measured`.

    control: whether a refit's control is made, too, see `has_control`.
    """
    job, say = stages.job, _teller(stages.job.task.metric)
    fused = stages.start("fused")
    measured["fused"] = stages.figures(stages.evidence(fused))
    say("fused, before any training", measured["fused"])

    beside = None
    if control and isinstance(stages, Stages) and has_control(job):
        beside = stages.start(CONTROL)
        measured[CONTROL] = stages.figures(stages.evidence(beside))
        say("control: a random model with the same refit", measured[CONTROL])

    finetuned = stages.finetune("fused")
    measured["finetuned"] = stages.figures(stages.evidence(finetuned))
    say("finetuned", measured["finetuned"])
    sparse = None
    if job.recipe.sparsify is not None:
        sparse = thin(stages, finetuned, job.recipe.sparsify, measured, say)
    return Trained(fused, finetuned, sparse, beside)


def make(job: BaseJob, store: Store, planned: Plan, shared: Shared | None = None) -> Made:
    """Make and measure all models of a job but for their latencies, as far as isn't done yet."""
    stages = stages_of(job, store, shared)
    deployment = Deployment(stages)
    say = _teller(job.task.metric)
    key = job.task.metric.key
    measured: dict[str, Figures] = {}

    parents = {}
    for parent in job.parents:
        parents[parent.name] = stages.parent(parent)
        measured[parent.name] = stages.figures(stages.outputs(parent).test)
        say(f"parent {parent.name}", measured[parent.name])

    anchor = None
    if job.anchor is not None and job.moves:
        anchor, _ = stages.parent(job.anchor)
        measured["anchor"] = stages.figures(stages.outputs(job.anchor).test)
        say("anchor", measured["anchor"])

    made = train(stages, measured)
    finetuned, sparse, child = made.finetuned, made.sparse, made.child
    baselines, starts = {}, {}
    for kind in job.recipe.baselines:
        name = row_of(kind)
        baselines[name] = stages.finetune(name)
        if isinstance(stages, NetStages):  # their methods are made for no training at all
            starts[name] = stages.figures(stages.evidence(stages.start(name)))
        measured[name] = stages.figures(stages.evidence(baselines[name]))
        say(f"baseline {name}", measured[name])

    batches = {
        row: batch_of(row, planned.models[-1].flops * job.count("test"), job.task)
        for row in ("onnx", "onnx-int8")
    }
    plain, parity = deployment.export("child", child.path, child.key)
    exported, tried = (plain, ()) if not job.recipe.export.optimize else deployment.optimised(plain)
    measured["onnx"] = stages.figures(
        deployment.evidence(exported, "model.onnx", child.path, batch=batches["onnx"])
    )
    small = quantise(deployment, plain, child, measured, batch=batches["onnx-int8"], say=say)
    int8 = small.stage if small is not None else None
    shipped = int8 if small is not None and small.shipped else None

    files = {"model.safetensors": "sparse" if sparse else "finetuned", "onnx/model.onnx": "onnx"}
    if shipped is not None:
        files["onnx/model_quantized.onnx"] = "onnx-int8"
    training = training_of(finetuned)
    chosen = training["chosen"]["step"] if training["chosen"] else 0
    shown = {file: (measured[row][key], batches.get(row)) for file, row in files.items()}
    parents_shown = {p.name: measured[p.name][key] for p in job.parents}
    told = card(job, sparse) if sparse is not None else ""
    readme = model_card(job, training["steps"], parents_shown, shown, __version__, told, chosen)
    made_of = provenance(job)
    package = store.stage(
        "package",
        {"finetuned": child.key, "onnx": exported.key, "card": readme,
         "int8": shipped.key if shipped is not None else None, "made_of": asdict(made_of)},
        lambda folder: build_package(folder, job, child, exported, shipped, readme, made_of),
    )  # fmt: skip

    timed: dict[str, File] = {}
    parent_parity = {}
    for name, (folder, key) in parents.items():
        parent_onnx, parent_parity[name] = deployment.export(name, folder, key)
        timed[name] = (parent_onnx.path / "model.onnx", parent_onnx.key)
    sizes = None
    if sparse is not None:
        sizes = measure_files(deployment, finetuned, exported, int8)
        timed[DENSE] = (sizes.dense.path / "model.onnx", sizes.dense.key)
        parent_parity[DENSE] = sizes.parity
    timed["onnx"] = (exported.path / "model.onnx", exported.key)
    if int8 is not None:
        timed["onnx-int8"] = (int8.path / "model_quantized.onnx", int8.key)
    evidence = {p.name: stages.outputs(p).test for p in job.parents}
    evidence["finetuned"] = stages.evidence(child)
    best = job.task.metric.best({name: figure.value for name, figure in parents_shown.items()})
    found = Measurements(
        job=job, plan=planned, measured=measured, parents=parents,
        anchor=anchor, parity={**parent_parity, "onnx": parity}, fused=made.fused,
        control=made.control, finetuned=finetuned, sparse=sparse, files=sizes,
        baselines=baselines, starts=starts, why=why(stages, made.fused, child),
        package=package, int8=int8,
        tried=tried if small is None else (*tried, *small.tried),
        int8_dropped=int8 is not shipped, batches=batches,
        evidence=evidence, passages=find_passages(stages, best, child, evidence),
    )  # fmt: skip
    return Made(store, deployment, package, timed, found)


def row_of(method: str) -> str:
    """Return the name of a baseline's row."""
    return next((row for row, m in METHOD_OF.items() if m == method), method)


def _teller(metric: Metric) -> Callable[[str, Figures], None]:
    def say(what: str, figures: Figures) -> None:
        console.print(f"  {what}: {metric.text(figures[metric.key])}")

    return say
