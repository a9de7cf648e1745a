"""`compress`: the story of a run, in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from slimfuse.errors import UserError
from slimfuse.families import Shape
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.lock import lock_of, lock_text, without_machine_paths
from slimfuse.pipeline.making import Made, make
from slimfuse.pipeline.nets_job import NetJob, prepare_nets
from slimfuse.pipeline.nets_planning import plan_nets
from slimfuse.pipeline.outline import make_outline
from slimfuse.pipeline.planning import Plan, check_disk, make_plan
from slimfuse.pipeline.results import make_report
from slimfuse.pipeline.shaping import pinned
from slimfuse.pipeline.sparse import check_zeros
from slimfuse.processes import assemble
from slimfuse.progress import working
from slimfuse.recipe import Located, NetRecipe, Recipe, load_located
from slimfuse.report import Report, fragment, render_html, to_json
from slimfuse.store import LOCK, RESULTS, Stage, Store, write_text


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

    def _repr_html_(self) -> str:
        """Return what a notebook shows of the run, see `Report`."""
        return fragment(self.report, str(self.folder / "report.html"))


def plan(recipe: str | Path, *, overrides: tuple[str, ...] = (), outline: bool = False) -> Plan:
    """Return what `compress` would make of a recipe, and what it needs, before any work.

    outline: read only the parents' config.json; no weights, data or tokenizers need be here.
    """
    quiet()
    path = Path(recipe)
    loaded = load_located(path, overrides)
    if not outline:
        return planned_of(prepared(loaded, path))
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
    if lock is None or lock["recipe"] != without_machine_paths(recipe.to_lock()):
        return prepare(recipe, path)
    return prepare_pinned(recipe, path, Shape(**lock["resolved"]["target"]))


def prepare_pinned(recipe: Recipe, path: Path, shape: Shape) -> Job:
    """Return the job of a recipe whose budget came to this shape before."""
    return replace(prepare(pinned(recipe, shape), path), recipe=recipe)


def prepared(loaded: Located, path: Path, store: Store | None = None) -> BaseJob:
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


def planned_of(job: BaseJob) -> Plan:
    if isinstance(job, NetJob):
        return plan_nets(job)
    assert isinstance(job, Job)
    return make_plan(job)


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
    Started by torchrun or accelerate it is one run of several processes, see docs/distributed.md.
    """
    quiet()
    team = assemble()
    with team.guard():
        path = Path(recipe)
        loaded = load_located(path, overrides)
        root = Path(out) if out is not None else Path("runs") / loaded.recipe.name
        store = Store(root, team=team)
        opened: list[tuple[BaseJob, Plan, str]] = []
        team.told(lambda: opened.append(_checked(loaded, path, store)))
        with store.lock():
            team.told(lambda: write_lock(opened[0][2], store))
            # the others only now: what the main one measured, or fetched, is there
            opened = opened or [_opened(loaded, path, store)]
            job, planned, lock = opened[0]
            team.check_alike(lock, "run")
            team.take(job.threads)
            try:
                return run_job(job, store, planned, command_of("compress", path, overrides, out))
            except UserError as error:  # one that only the work could show
                error.where = loaded.locate(error.where)
                raise


def _opened(loaded: Located, path: Path, store: Store) -> tuple[BaseJob, Plan, str]:
    """Return a recipe's job, its plan and its lock."""
    job = prepared(loaded, path, store)
    return job, planned_of(job), lock_text(job)


def _checked(loaded: Located, path: Path, store: Store) -> tuple[BaseJob, Plan, str]:
    """Return the same, if the run folder is ours and there is room for the run."""
    store.check_ours()
    job, planned, lock = _opened(loaded, path, store)
    check_disk(planned, store, lock)
    return job, planned, lock


def run_job(job: BaseJob, store: Store, planned: Plan, command: str) -> Run:
    """Make, measure and publish what a job asks for, in a store that is held."""
    made = make(job, store, planned)
    return publish(made, made.deployment.bench(made.files), command)


def publish(made: Made, bench: dict[str, Any], command: str) -> Run:
    """Write the report and the model of what was made into its run folder.

    bench: latencies, see `Deployment.bench`; command: what repeats the run.
    """
    store, lock = made.store, lock_of(made.found.job)
    report = make_report(
        replace(made.found, bench=bench, command=command, lock=lock, timings=store.timings())
    )
    run = Run(store.root, store.root / "model", report)
    store.team.told(lambda: _write(run, made.package, store))
    return run


def _write(run: Run, package: Stage, store: Store) -> None:
    with working("drawing the report"):
        values, html = to_json(run.report), render_html(run.report)  # whole, or nothing
    store.withdraw("report.json", "report.html")  # never a report beside another model
    store.publish(package, run.model.name)
    write_text(store.root / "report.json", values)
    write_text(store.root / "report.html", html)
    store.log("run", "done", gates=run.passed)


def write_lock(text: str, store: Store, name: str = LOCK, results: Sequence[str] = RESULTS) -> None:
    """Write recipe.lock.yaml, or another lock; results of another one are withdrawn first."""
    store.check_ours(name, results)
    path = store.root / name
    if not path.is_file() or path.read_bytes() != text.encode():
        store.withdraw(*results)
        write_text(path, text)


def command_of(
    verb: str, path: Path, overrides: Sequence[str], out: str | Path | None, *more: str
) -> str:
    """Return the command line that does it again."""
    import shlex

    words = ["slimfuse", verb, str(path)]
    words += [w for o in overrides for w in ("--set", o)]
    words += ["--out", str(out)] if out is not None else []
    return shlex.join([*words, *more])


def quiet() -> None:
    """Keep transformers' own bars and notices off the screen."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


__all__ = ["Run", "compress", "plan", "prepare_again", "quiet", "write_lock"]
