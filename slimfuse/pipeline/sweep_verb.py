"""`sweep`: a recipe at several settings, what they share made once, and which of them to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from slimfuse import __version__
from slimfuse.cluster import check_address
from slimfuse.errors import CheckFailed, UserError
from slimfuse.pipeline.candidates import EXAMPLE, FOLDER, Candidate, candidates, every, sharing
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.lock import dumped, lock_text
from slimfuse.pipeline.making import Made, make
from slimfuse.pipeline.planning import Plan, check_disk, joint
from slimfuse.pipeline.run import (
    Run,
    command_of,
    planned_of,
    prepared,
    publish,
    quiet,
    write_lock,
)
from slimfuse.pipeline.search import axes_of, check_space
from slimfuse.pipeline.sweep_machines import across
from slimfuse.pipeline.sweep_report import make_sweep_report
from slimfuse.pipeline.sweep_search import Trials, searched, trials_of
from slimfuse.pipeline.sweep_timing import time_together
from slimfuse.processes import alone
from slimfuse.progress import console, working
from slimfuse.recipe import Located, load_located
from slimfuse.report import Search, SweepReport, render_sweep, sweep_fragment, to_json
from slimfuse.report.sweep_rows import SCHEMA
from slimfuse.stock import one_process
from slimfuse.store import Store, digest, write_text

LOCK = "sweep.lock.yaml"
RESULTS = ("sweep.json", "sweep.html")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: its folder, its report, and the runs by their candidates' names."""

    folder: Path
    report: SweepReport
    runs: Mapping[str, Run]

    @property
    def passed(self) -> bool:
        """Whether some candidate passes all gates of the recipe."""
        return self.report.passed

    def _repr_html_(self) -> str:
        """Return what a notebook shows of the sweep, see `SweepReport`."""
        return sweep_fragment(self.report, str(self.folder / "sweep.html"))

    @property
    def picked(self) -> Run | None:
        """The run that is taken; None where no candidate passes or nothing decides."""
        return self.runs.get(self.report.picked)


@dataclass(frozen=True)
class Entry:
    """A candidate with its recipe, its opened inputs, its plan and its run folder."""

    candidate: Candidate
    loaded: Located
    job: BaseJob
    plan: Plan
    store: Store


def sweep(
    recipe: str | Path,
    *,
    vary: Sequence[str] = (),
    overrides: Sequence[str] = (),
    search: Sequence[str] = (),
    trials: int = 0,
    ray: str | None = None,
    out: str | Path | None = None,
) -> Sweep:
    """Run a recipe with every combination of some keys' values, and compare what comes out.

    vary: options `KEY=V1,V2,…`; their product are the candidates. Commas in brackets part no
    values, and an option with one value holds for all. overrides: `a.b=value`, for all.
    search: `KEY=LOW..HIGH` or `KEY=V1,V2,…`: settings that are sought for every candidate in so
    many trials on held-out training samples (Optuna); the best ones are then run and measured on
    the test set. Where a key of the target is searched, the trials that no other one beats in
    quality and parameters become candidates.
    ray: `HOST:PORT` of a Ray cluster whose machines make the candidates and share the files here,
    `auto` for the cluster of this machine, `local` for this machine's processors.
    Parents, teachers' answers and prepared samples are shared; every candidate ends as a run of its
    own in out/candidates (default out: runs/NAME-sweep), its latency measured in turns with all
    others'. Of the candidates that pass the recipe's gates the fastest is picked, else the best
    within its budget. A killed sweep goes on where it stood when it is called again.
    Raises UserError for bad input, in one error for all candidates and before any work.
    """
    alone("sweep")
    quiet()
    path = Path(recipe)
    asked, axes = candidates(vary, overrides), axes_of(search, trials)
    if ray is not None:
        check_address(ray)
    if len(asked) < 2 and not axes:
        raise UserError(
            "nothing varies: a sweep needs two candidates or more",
            where="--set",
            got=", ".join(vary) or "no values",
            allowed=f"KEY=V1,V2, as in {EXAMPLE}",
            hint="one run is made by slimfuse compress",
        )
    if axes and ray is not None:  # each trial is chosen by what the ones before it found
        raise UserError(
            "a search doesn't run on Ray yet",
            where="--ray",
            got="--search",
            allowed="one of the two",
            hint="search first, then sweep the values that it found with --set and --ray",
        )
    root = Path(out) if out is not None else Path("runs") / f"{_name(path, asked)}-sweep"
    store = Store(root, crowded=ray is not None)
    store.check_ours(LOCK, RESULTS)
    entries = opened(path, asked, store)
    lock = _lock(entries, vary, overrides, search, trials)
    sought: list[Trials] = []
    if axes:
        for one in asked:
            check_space(axes, partial(_loaded, path, one))
        sought = trials_of(path, asked, [entry.job for entry in entries], axes, store)
    plans = [entry.plan for entry in entries]
    check_disk(joint(plans, len(plans) * trials), store, lock, LOCK)
    torch.set_num_threads(entries[0].job.threads)
    with store.lock():
        write_lock(lock, store, LOCK, RESULTS)
        more = [w for one in search for w in ("--search", one)]
        more += ["--trials", str(trials)] if trials else []
        command = command_of("sweep", path, (*overrides, *vary), out, *more)
        searches: list[Search] = []
        if sought:
            asked, searches = searched(sought, trials)
            entries = opened(path, asked, store)
        broken = {} if ray is None else across(entries, store, path, ray)
        return _run(entries, store, path, command, searches, broken)


def opened(path: Path, asked: Sequence[Candidate], store: Store) -> list[Entry]:
    """Return candidates with their inputs; raises UserError for all that can't be made at once."""

    def open_one(one: Candidate) -> tuple[Located, BaseJob, Store]:
        own = Store(store.root / FOLDER / one.folder, store)
        own.check_ours()
        loaded = load_located(path, one.overrides)
        return loaded, prepared(loaded, path, own), own

    found = every(asked, open_one)
    jobs = sharing({name: job for name, (_, job, _) in found.items()}, store)
    plans = {name: planned_of(job) for name, job in jobs.items()}
    return [
        Entry(one, found[one.name][0], jobs[one.name], plans[one.name], found[one.name][2])
        for one in asked
    ]


def _name(path: Path, asked: Sequence[Candidate]) -> str:
    """Return the recipe's name, which is the same for all; "" where no candidate can be read."""
    for one in asked:
        with suppress(UserError):
            return load_located(path, one.overrides).recipe.name
    return ""


def _loaded(path: Path, one: Candidate, more: Sequence[str]) -> None:
    load_located(path, (*one.overrides, *more))


def made_of(entry: Entry, wait: float = 0.0) -> Made:
    """Make and measure one candidate's models, as far as isn't done yet; wait: for its folder."""
    with entry.store.lock(wait):
        write_lock(lock_text(entry.job), entry.store)
        try:
            return make(entry.job, entry.store, entry.plan)
        except UserError as error:  # one that only the work could show
            error.where = entry.loaded.locate(error.where)
            raise


def _run(
    entries: Sequence[Entry],
    store: Store,
    path: Path,
    command: str,
    searches: Sequence[Search] = (),
    broken: Mapping[str, CheckFailed] | None = None,
) -> Sweep:
    made: dict[str, Made] = {}
    failed: dict[str, str] = {}
    with one_process():
        for number, entry in enumerate(entries, 1):
            name = entry.candidate.name
            console.print(f"candidate {number} of {len(entries)}: {name}", markup=False)
            try:
                if broken and name in broken:
                    raise broken[name]
                made[name] = made_of(entry)
            except CheckFailed as error:  # a failure is a figure, not the end
                failed[name] = f"{name} is left out: {error.what}" + (
                    f" ({error.got})" if error.got is not None else ""
                )
                if len(failed) == len(entries):
                    raise
    timed = time_together(made, store)
    runs = {}
    for entry in entries:
        name, home = entry.candidate.name, entry.store
        if name in made:
            told = command_of("compress", path, entry.candidate.overrides, home.root)
            with home.lock():
                runs[name] = publish(made[name], timed.of(made[name]), told)
    with working("drawing the sweep"):
        kept = [entry for entry in entries if entry.candidate.name in made]
        report = make_sweep_report(
            {entry.candidate.name: (entry.candidate, entry.plan) for entry in kept},
            made, {name: run.report for name, run in runs.items()}, timed, store,
            command=command, path=path, failed=tuple(failed.values()), searches=searches,
        )  # fmt: skip
        values, html = to_json(report, SCHEMA), render_sweep(report)
    store.withdraw(*RESULTS)
    write_text(store.root / "sweep.json", values)
    write_text(store.root / "sweep.html", html)
    store.log("sweep", "done", picked=report.picked)
    return Sweep(store.root, report, runs)


def _lock(
    entries: Sequence[Entry],
    vary: Sequence[str],
    overrides: Sequence[str],
    search: Sequence[str],
    trials: int,
) -> str:
    """Return what the sweep depends on."""
    return dumped(
        {
            "slimfuse": __version__,
            "overrides": [*overrides],
            "vary": [*vary],
            "search": [*search],
            "trials": trials,
            "candidates": {e.candidate.name: digest(lock_text(e.job)) for e in entries},
        }
    )
