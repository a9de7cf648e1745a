"""`compress`: the story of a run, in order."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from slimfuse import __version__
from slimfuse.errors import UserError
from slimfuse.families import Shape
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.deployment import Deployment, batch_of
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.nets_job import NetJob, prepare_nets
from slimfuse.pipeline.nets_planning import plan_nets
from slimfuse.pipeline.nets_stages import NetStages
from slimfuse.pipeline.outline import make_outline
from slimfuse.pipeline.package import build_package, model_card
from slimfuse.pipeline.planning import Plan, check_disk, make_plan
from slimfuse.pipeline.results import Measurements, make_report
from slimfuse.pipeline.shaping import pinned
from slimfuse.pipeline.sparse import check_zeros, thin
from slimfuse.pipeline.sparse_report import card, measure_files
from slimfuse.pipeline.stages import METHOD_OF, BaseStages, Figures, Stages
from slimfuse.pipeline.tuning import finetune_steps
from slimfuse.progress import console, working
from slimfuse.recipe import Located, NetRecipe, Recipe, load_located
from slimfuse.report import Report, render_html, to_json
from slimfuse.store import LOCK, RESULTS, Store, write_text
from slimfuse.tasks import Metric


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the deployable model in it, and the report."""

    folder: Path
    model: Path
    report: Report

    @property
    def passed(self) -> bool:
        """Whether every gate of the recipe holds."""
        return all(gate.passed for gate in self.report.gates)


def plan(recipe: str | Path, *, overrides: tuple[str, ...] = (), outline: bool = False) -> Plan:
    """Return what `compress` would make of a recipe, and what it needs, before any work.

    outline: read only the parents' config.json; no weights, data or tokenizers need be here.
    """
    quiet()
    path = Path(recipe)
    loaded = load_located(path, overrides)
    if not outline:
        return _planned(_prepared(loaded, path))
    try:
        return make_outline(loaded.recipe, path)
    except UserError as error:
        error.where = loaded.locate(error.where)
        raise


def prepare_again(recipe: Recipe, path: Path, store: Store) -> Job:
    """Return the job of a recipe, with the shape of the run that stands in the store.

    So a run with a latency budget goes on: a latency is never the same twice.
    """
    file = store.root / LOCK
    if recipe.target.budget is None or recipe.target.budget.latency_ratio is None:
        return prepare(recipe, path)
    lock = YAML(typ="safe").load(file.read_text(encoding="utf-8")) if file.is_file() else None
    if lock is None or lock["recipe"] != _without_machine_paths(recipe.to_lock()):
        return prepare(recipe, path)
    shape = Shape(**lock["resolved"]["target"])
    return replace(prepare(pinned(recipe, shape), path), recipe=recipe)


def _prepared(loaded: Located, path: Path, store: Store | None = None) -> BaseJob:
    """Return the job of a recipe; an error about one of its keys tells the key's line."""
    recipe = loaded.recipe
    try:
        job: BaseJob
        if isinstance(recipe, NetRecipe):
            job = prepare_nets(recipe, path)
        else:
            job = prepare(recipe, path) if store is None else prepare_again(recipe, path, store)
        check_zeros(recipe.sparsify, job.family, job.target)
        return job
    except UserError as error:
        error.where = loaded.locate(error.where)
        raise


def _planned(job: BaseJob) -> Plan:
    if isinstance(job, NetJob):
        return plan_nets(job)
    assert isinstance(job, Job)
    return make_plan(job)


def _stages(job: BaseJob, store: Store) -> BaseStages:
    if isinstance(job, NetJob):
        return NetStages(job, store)
    assert isinstance(job, Job)
    return Stages(job, store)


def compress(
    recipe: str | Path,
    *,
    overrides: tuple[str, ...] = (),
    out: str | Path | None = None,
) -> Run:
    """Run a recipe and return the finished run.

    recipe: a YAML file. overrides: `a.b=value` changes to it. out: the run folder (default
    `runs/NAME`). A killed run goes on where it stood when it is called again. Raises
    `slimfuse.errors.UserError` for bad input and `CheckFailed` for a check that doesn't hold.
    """
    quiet()
    path = Path(recipe)
    loaded = load_located(path, overrides)
    store = Store(Path(out) if out is not None else Path("runs") / loaded.recipe.name)
    store.check_ours()
    job = _prepared(loaded, path, store)
    planned = _planned(job)
    lock = lock_text(job)
    check_disk(planned, store, lock)
    torch.set_num_threads(job.threads)
    with store.lock():
        write_lock(lock, store)
        try:
            return _run(job, store, planned, _command(path, overrides, out))
        except UserError as error:  # one that only the work could show
            error.where = loaded.locate(error.where)
            raise


def has_control(job: BaseJob) -> bool:
    """Whether the start is refitted, and what that makes of a random model isn't asked anyway."""
    fuse = job.recipe.fuse
    refits = fuse.method == "refit" or (fuse.method == "gauge" and getattr(fuse, "refit", True))
    return refits and CONTROL not in job.recipe.baselines


CONTROL = "random-refit"
"""The control that stands beside every refit's one-shot figure."""


def _run(job: BaseJob, store: Store, planned: Plan, command: str) -> Run:
    stages = _stages(job, store)
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

    fused = stages.start("fused")
    measured["fused"] = stages.figures(stages.evidence(fused))
    say("fused, before any training", measured["fused"])

    control = None
    if isinstance(stages, Stages) and has_control(job):
        control = stages.start(CONTROL)
        measured[CONTROL] = stages.figures(stages.evidence(control))
        say("control: a random model with the same refit", measured[CONTROL])

    finetuned = stages.finetune("fused")
    measured["finetuned"] = stages.figures(stages.evidence(finetuned))
    say("finetuned", measured["finetuned"])
    sparse, child = None, finetuned  # the child is what ships
    if job.recipe.sparsify is not None:
        sparse = thin(stages, finetuned, job.recipe.sparsify, measured, say)
        child = sparse.child.stage
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
    exported, parity = deployment.export("child", child.path, child.key)
    measured["onnx"] = stages.figures(
        deployment.evidence(exported, "model.onnx", child.path, batch=batches["onnx"])
    )
    int8 = None
    if job.recipe.export.quantize.mode != "none":
        int8 = deployment.quantised(exported)
        measured["onnx-int8"] = stages.figures(
            deployment.evidence(
                int8, "model_quantized.onnx", child.path, batch=batches["onnx-int8"]
            )
        )
        say("ONNX INT8", measured["onnx-int8"])
    drop = int8_loss(job, measured) if int8 is not None else 0.0
    quantize = job.recipe.export.quantize
    shipped = int8 if quantize.mode == "dynamic" or drop <= quantize.max_drop else None

    files = {"model.safetensors": "sparse" if sparse else "finetuned", "onnx/model.onnx": "onnx"}
    if shipped is not None:
        files["onnx/model_quantized.onnx"] = "onnx-int8"
    steps = finetune_steps(job)
    shown = {file: (measured[row][key], batches.get(row)) for file, row in files.items()}
    parents_shown = {p.name: measured[p.name][key] for p in job.parents}
    told = card(job, sparse) if sparse is not None else ""
    readme = model_card(job, steps, parents_shown, shown, __version__, told)
    package = store.stage(
        "package",
        {"finetuned": child.key, "onnx": exported.key, "card": readme,
         "int8": shipped.key if shipped is not None else None},
        lambda folder: build_package(folder, job, child, exported, shipped, readme),
    )  # fmt: skip

    models: dict[str, tuple[Path, str]] = {}
    parent_parity = {}
    for name, (folder, key) in parents.items():
        parent_onnx, parent_parity[name] = deployment.export(name, folder, key)
        models[name] = (parent_onnx.path / "model.onnx", parent_onnx.key)
    sizes = None
    if sparse is not None:
        sizes = measure_files(deployment, finetuned, exported, int8)
        models["finetuned"] = (sizes.dense.path / "model.onnx", sizes.dense.key)
        parent_parity["finetuned"] = sizes.parity
    models["onnx"] = (exported.path / "model.onnx", exported.key)
    if int8 is not None:
        models["onnx-int8"] = (int8.path / "model_quantized.onnx", int8.key)
    latency = deployment.latency(models)

    report = make_report(
        Measurements(
            job=job, plan=planned, command=command, measured=measured, parents=parents,
            anchor=anchor, parity={**parent_parity, "onnx": parity}, fused=fused,
            control=control, finetuned=finetuned, sparse=sparse, files=sizes,
            baselines=baselines, starts=starts,
            exported=exported, int8=int8, int8_dropped=int8 is not shipped, latency=latency,
            lock=lock_of(job), timings=store.timings(), batches=batches,
            evidence={name: stages.outputs(p).test for name, p in _named(job).items()}
            | {"finetuned": stages.evidence(child)},
        )
    )  # fmt: skip
    with working("drawing the report"):
        values, html = to_json(report), render_html(report)  # whole, or nothing is published
    store.withdraw("report.json", "report.html")  # never a report beside another model
    model = store.publish(package, "model")
    write_text(store.root / "report.json", values)
    write_text(store.root / "report.html", html)
    store.log("run", "done", gates=all(g.passed for g in report.gates))
    return Run(store.root, model, report)


def row_of(method: str) -> str:
    """Return the name of a baseline's row."""
    return next((row for row, m in METHOD_OF.items() if m == method), method)


def write_lock(text: str, store: Store) -> None:
    """Write recipe.lock.yaml; results of another recipe are withdrawn first."""
    store.check_ours()
    path = store.root / LOCK
    if not path.is_file() or path.read_bytes() != text.encode():
        store.withdraw(*RESULTS)
        write_text(path, text)


def lock_text(job: BaseJob) -> str:
    """Return what recipe.lock.yaml holds."""
    import io

    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(lock_of(job), text)
    return text.getvalue()


def lock_of(job: BaseJob) -> dict[str, Any]:
    """Return everything a run depends on: the full recipe, versions, digests of the inputs."""
    return {
        "slimfuse": __version__,
        "recipe": _without_machine_paths(job.recipe.to_lock()),
        "resolved": {
            "threads": job.threads,
            "precision": job.precision,
            "target": {k: getattr(job.family.shape(job.target), k) for k in _shape_keys(job)},
        },
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: version(name) for name in (*job.libraries, "onnxruntime")},
        },
        "sha256": {
            "data": job.data.fingerprint,
            "parents": {
                p.name: p.sha256
                for p in (*job.parents, job.anchor)
                if p is not None and p.sha256 is not None
            },
        },
    }


def _without_machine_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Keep the last name of absolute paths: what they hold is known by its sha256."""
    places = [(recipe["data"], "path"), (recipe["data"], "tokenizer")]
    places += [(p, "from") for p in recipe["parents"]]
    trained = [p["train"] for p in recipe["parents"] if p.get("train")]
    places += [(train, "start") for train in trained if train.get("start")]
    anchor = recipe["fuse"].get("anchor") or recipe["fuse"]["ot"].get("anchor")
    if anchor is not None:
        places.append((anchor, "from"))
    for place, key in places:
        path = Path(place[key] or "")
        if path.is_absolute() or path.parts[:1] == ("~",):
            place[key] = f"…/{path.name}"
    return recipe


def _shape_keys(job: BaseJob) -> list[str]:
    return list(job.family.shape(job.target).__dataclass_fields__)


def _named(job: BaseJob) -> dict[str, Any]:
    return {p.name: p for p in job.parents}


def int8_loss(job: BaseJob, measured: Mapping[str, Figures]) -> float:
    """Return how much worse the INT8 file is than the ONNX file, see `Metric.loss`."""
    metric = job.task.metric
    got, base = (measured[row][metric.key].value for row in ("onnx-int8", "onnx"))
    return metric.loss(got, base)


def _teller(metric: Metric) -> Callable[[str, Figures], None]:
    def say(what: str, figures: Figures) -> None:
        console.print(f"  {what}: {metric.text(figures[metric.key])}")

    return say


def _command(path: Path, overrides: tuple[str, ...], out: str | Path | None) -> str:
    import shlex

    words = ["slimfuse", "compress", str(path)]
    words += [w for o in overrides for w in ("--set", o)]
    words += ["--out", str(out)] if out is not None else []
    return shlex.join(words)


def quiet() -> None:
    """Keep transformers' own bars and notices off the screen."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


__all__ = [
    "Run", "compress", "lock_of", "lock_text", "plan", "prepare_again", "quiet", "write_lock",
]  # fmt: skip
