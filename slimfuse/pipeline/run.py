"""`compress`: the story of a run, in order."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from slimfuse import __version__
from slimfuse.errors import UserError
from slimfuse.finetune.loop import steps_of
from slimfuse.pipeline.deployment import Deployment, batch_of
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.package import build_package, model_card
from slimfuse.pipeline.planning import Plan, check_disk, make_plan
from slimfuse.pipeline.results import Measurements, make_report
from slimfuse.pipeline.stages import LIBRARIES, Stages
from slimfuse.progress import console, working
from slimfuse.recipe import Located, load_located
from slimfuse.report import Report, render_html, to_json
from slimfuse.store import LOCK, RESULTS, Store, write_text
from slimfuse.tasks.image_classification import Measured


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


def plan(recipe: str | Path, *, overrides: tuple[str, ...] = ()) -> Plan:
    """Return what `compress` would make of a recipe, and what it needs, before any work."""
    quiet()
    path = Path(recipe)
    return make_plan(_prepared(load_located(path, overrides), path))


def _prepared(loaded: Located, path: Path) -> Job:
    """Return the job of a recipe; an error about one of its keys tells the key's line."""
    try:
        return prepare(loaded.recipe, path)
    except UserError as error:
        error.where = loaded.locate(error.where)
        raise


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
    job = _prepared(loaded, path)
    planned = make_plan(job)
    lock = lock_text(job)
    check_disk(planned, store, lock)
    torch.set_num_threads(job.threads)
    with store.lock():
        write_lock(lock, store)
        return _run(job, store, planned, _command(path, overrides, out))


def _run(job: Job, store: Store, planned: Plan, command: str) -> Run:
    stages = Stages(job, store)
    deployment = Deployment(stages)
    say = _teller()
    measured: dict[str, Measured] = {}

    parents = {}
    for parent in job.parents:
        parents[parent.name] = stages.parent(parent)
        measured[parent.name] = stages.accuracy(stages.outputs(parent).test)
        say(f"parent {parent.name}", measured[parent.name])

    fused = stages.start("fused")
    measured["fused"] = stages.accuracy(stages.scores(fused))
    say("fused, before any training", measured["fused"])

    finetuned = stages.finetune("fused")
    measured["finetuned"] = stages.accuracy(stages.scores(finetuned))
    say("finetuned", measured["finetuned"])
    baselines = {}
    for kind in job.recipe.baselines:
        name = BASELINES[kind]
        baselines[name] = stages.finetune(name)
        measured[name] = stages.accuracy(stages.scores(baselines[name]))
        say(f"baseline {name}", measured[name])

    batches = {
        row: batch_of(row, planned.models[-1].flops * len(job.data.test))
        for row in ("onnx", "onnx-int8")
    }
    exported, parity = deployment.export("child", finetuned.path, finetuned.key)
    measured["onnx"] = stages.accuracy(
        deployment.scores(exported, "model.onnx", finetuned.path, batch=batches["onnx"])
    )
    int8 = None
    if job.recipe.export.quantize.mode != "none":
        int8 = deployment.quantised(exported)
        measured["onnx-int8"] = stages.accuracy(
            deployment.scores(
                int8, "model_quantized.onnx", finetuned.path, batch=batches["onnx-int8"]
            )
        )
        say("ONNX INT8", measured["onnx-int8"])
    drop = measured["onnx"].value - measured["onnx-int8"].value if int8 is not None else 0.0
    quantize = job.recipe.export.quantize
    shipped = int8 if quantize.mode == "dynamic" or drop <= quantize.max_drop else None

    files = {"model.safetensors": "finetuned", "onnx/model.onnx": "onnx"}
    if shipped is not None:
        files["onnx/model_quantized.onnx"] = "onnx-int8"
    steps = steps_of(
        len(job.data.train), job.recipe.finetune.epochs, job.recipe.finetune.batch_size
    )
    shown = {file: (measured[row], batches.get(row)) for file, row in files.items()}
    card = model_card(job, steps, measured, shown, __version__)
    package = store.stage(
        "package",
        {"finetuned": finetuned.key, "onnx": exported.key, "card": card,
         "int8": shipped.key if shipped is not None else None},
        lambda folder: build_package(folder, job, finetuned, exported, shipped, card),
    )  # fmt: skip

    models: dict[str, tuple[Path, str]] = {}
    parent_parity = {}
    for name, (folder, key) in parents.items():
        parent_onnx, parent_parity[name] = deployment.export(name, folder, key)
        models[name] = (parent_onnx.path / "model.onnx", parent_onnx.key)
    models["onnx"] = (exported.path / "model.onnx", exported.key)
    if int8 is not None:
        models["onnx-int8"] = (int8.path / "model_quantized.onnx", int8.key)
    latency = deployment.latency(models)

    report = make_report(
        Measurements(
            job=job, plan=planned, command=command, measured=measured, parents=parents,
            parity={**parent_parity, "onnx": parity}, fused=fused, finetuned=finetuned,
            baselines=baselines, exported=exported, int8=int8, int8_dropped=int8 is not shipped,
            latency=latency, lock=lock_of(job), timings=store.timings(), batches=batches,
            scores={name: stages.outputs(p).test for name, p in _named(job).items()}
            | {"finetuned": stages.scores(finetuned)},
        )
    )  # fmt: skip
    with working("drawing the report"):
        html = render_html(report)
    store.withdraw("report.json", "report.html")  # never a report beside another model
    model = store.publish(package, "model")
    write_text(store.root / "report.json", to_json(report))
    write_text(store.root / "report.html", html)
    store.log("run", "done", gates=all(g.passed for g in report.gates))
    return Run(store.root, model, report)


BASELINES = {"random": "random-start", "subclone": "subclone"}


def write_lock(text: str, store: Store) -> None:
    """Write recipe.lock.yaml; results of another recipe are withdrawn first."""
    store.check_ours()
    path = store.root / LOCK
    if not path.is_file() or path.read_bytes() != text.encode():
        store.withdraw(*RESULTS)
        write_text(path, text)


def lock_text(job: Job) -> str:
    """Return what recipe.lock.yaml holds."""
    import io

    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(lock_of(job), text)
    return text.getvalue()


def lock_of(job: Job) -> dict[str, Any]:
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
            **{name: version(name) for name in (*LIBRARIES, "onnxruntime")},
        },
        "sha256": {
            "data": job.data.fingerprint,
            "parents": {p.name: p.sha256 for p in job.parents if p.sha256 is not None},
        },
    }


def _without_machine_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Keep the last name of absolute paths: what they hold is known by its sha256."""
    for place, key in [(recipe["data"], "path"), *((p, "from") for p in recipe["parents"])]:
        path = Path(place[key] or "")
        if path.is_absolute() or path.parts[:1] == ("~",):
            place[key] = f"…/{path.name}"
    return recipe


def _shape_keys(job: Job) -> list[str]:
    return list(job.family.shape(job.target).__dataclass_fields__)


def _named(job: Job) -> dict[str, Any]:
    return {p.name: p for p in job.parents}


def _teller() -> Callable[[str, Measured], None]:
    def say(what: str, measured: Measured) -> None:
        half = (measured.high - measured.low) / 2
        console.print(f"  {what}: {measured.value:.2%} ± {half:.2%}")

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


__all__ = ["Run", "compress", "lock_of", "lock_text", "plan", "quiet", "write_lock"]
