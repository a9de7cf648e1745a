"""The search of a sweep: trials made by the stages of a run, on held-out training samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slimfuse.pipeline.candidates import Candidate, every, sharing
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.making import stages_of, train
from slimfuse.pipeline.run import planned_of, prepared
from slimfuse.pipeline.search import SECONDS, VALIDATION, Axis, Searching, goals_of
from slimfuse.pipeline.shaping import pinned
from slimfuse.pipeline.stages import Figures
from slimfuse.progress import console
from slimfuse.recipe import Recipe, load_located
from slimfuse.report import Search
from slimfuse.store import Store, digest

BARE = ("baselines=[]", "gates=[]")  # of a trial nothing is asked but its own figure


@dataclass
class Trials:
    """How settings of one candidate are tried.

    run: the candidate's own job, whose shape all trials have unless shapes are searched; like: a
    job on the held-out samples, whose prepared samples all trials share.
    """

    path: Path
    candidate: Candidate
    axes: Sequence[Axis]
    run: BaseJob
    store: Store
    like: BaseJob = field(init=False)

    def __post_init__(self) -> None:
        self.like = self._job(())

    def _job(self, settings: Sequence[str]) -> BaseJob:
        held = () if self.run.recipe.data.validation is not None else (VALIDATION,)
        loaded = load_located(self.path, (*self.candidate.overrides, *settings, *held, *BARE))
        recipe, shaped = loaded.recipe, any(a.key.startswith("target") for a in self.axes)
        if isinstance(recipe, Recipe) and isinstance(self.run, Job) and not shaped:
            # a measured latency is never the same twice
            loaded = replace(loaded, recipe=pinned(recipe, self.run.proposal.shape))
        return prepared(loaded, self.path)

    def measure(self, settings: Sequence[str]) -> dict[str, float]:
        """Return a trial's figures of all that is sought."""
        job = sharing({"like": self.like, "trial": self._job(settings)}, self.store)["trial"]
        own = Store(self.store.root, self.store)
        measured: dict[str, Figures] = {}
        made = train(stages_of(job, own), measured, control=False)
        metric = job.task.metric.key
        row = "finetuned" if made.sparse is None else made.sparse.child.row
        params = planned_of(job).models[-1].params
        spent = sum(own.timings().values())
        return {metric: measured[row][metric].value, "params": float(params), SECONDS: spent}

    @property
    def searching(self) -> Searching:
        """The search that tries them."""
        job, metric = self.like, self.like.task.metric
        on = [stages_of(job, self.store).base, digest(job.recipe.to_lock())]
        goals = goals_of(self.axes, metric.key, metric.better)
        seed = job.recipe.runtime.seed
        return Searching(self.store.root, self.candidate, self.axes, goals, seed, self.measure, on)


def trials_of(
    path: Path,
    asked: Sequence[Candidate],
    jobs: Sequence[BaseJob],
    axes: Sequence[Axis],
    store: Store,
) -> list[Trials]:
    """Return how each candidate is searched; raises UserError for what can't be measured so."""
    own = {one.name: job for one, job in zip(asked, jobs, strict=True)}
    return list(every(asked, lambda one: Trials(path, one, axes, own[one.name], store)).values())


def searched(found: Sequence[Trials], count: int) -> tuple[list[Candidate], list[Search]]:
    """Search every candidate in `count` trials, and return the candidates that come of it."""
    kept, records = [], []
    for one in found:
        console.print(f"searching {one.candidate.name}", markup=False)
        searching = one.searching
        searching.run(count)
        best, record = searching.found(one.like.count("test"))
        kept += best
        records.append(record)
    return kept, records
