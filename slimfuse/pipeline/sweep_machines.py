"""The candidates of a sweep on the machines of a Ray cluster: what stays here, what goes there.

Every machine sees the sweep's folder. What candidates have in common is made here, before; each
candidate is one call, which leaves its stages in the folder; all else, the latencies too, is done
here, by what a sweep on one machine does, which finds the stages made.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slimfuse.cluster import Needs, answered
from slimfuse.errors import CheckFailed, UserError
from slimfuse.pipeline.deployment import Deployment
from slimfuse.pipeline.lock import lock_text
from slimfuse.pipeline.making import stages_of
from slimfuse.pipeline.run import write_lock
from slimfuse.progress import console, track
from slimfuse.store import Store, digest, write_text

if TYPE_CHECKING:
    from slimfuse.pipeline.sweep_verb import Entry

TASK = "slimfuse.pipeline.sweep_task"
LOG, MARK = "ray.log", ".mark"
WAIT = 120.0
"""Seconds for a worker to end whose machine was cut off, or whose sweep was killed."""


def across(
    entries: Sequence[Entry], store: Store, path: Path, address: str
) -> dict[str, CheckFailed]:
    """Make all candidates on a cluster's machines; return the checks that failed, by candidate.

    Raises the first other error of a candidate, which ends the others.
    """
    root, recipe, threads = store.root.resolve(), path.resolve(), entries[0].job.threads
    calls = {
        entry.candidate.name: {
            "recipe": str(path), "cwd": str(Path.cwd()), "root": str(root),
            "name": entry.candidate.name, "overrides": [*entry.candidate.overrides],
            "threads": threads,
        }
        for entry in entries
    }  # fmt: skip
    mark, text = root / MARK, uuid.uuid4().hex
    write_text(mark, text)
    broken: dict[str, CheckFailed] = {}
    try:
        answers = answered(
            address, f"{TASK}:make_candidate", calls,
            needs=Needs(threads, int(torch.cuda.is_available())), hello=(f"{TASK}:hello", {}),
            seen=[(mark, text), (recipe, recipe.read_text(encoding="utf-8"))],
            before=partial(make_shared, entries), log=root / LOG,
        )  # fmt: skip
        with closing(answers), track("candidates", len(calls)) as tell:
            for number, answer in enumerate(answers, 1):
                if isinstance(answer.error, CheckFailed):
                    broken[answer.name] = answer.error
                elif answer.error is not None:
                    if isinstance(answer.error, UserError) and answer.error.where is None:
                        answer.error.where = answer.name
                    raise answer.error
                console.print(f"  {answer.name}: made on {answer.node}", markup=False)
                tell(number)
    finally:
        mark.unlink(missing_ok=True)
    return broken


def make_shared(entries: Sequence[Entry]) -> None:
    """Write each candidate's lock, and make what several have in common before their own work.

    That is: parents, their answers and their ONNX files.
    """
    for entry in entries:
        with entry.store.lock(WAIT):
            write_lock(lock_text(entry.job), entry.store)
    alike: dict[str, list[Entry]] = {}
    for entry in entries:
        parents = [parent.model_dump(mode="json") for parent in entry.job.recipe.parents]
        key = digest([stages_of(entry.job, entry.store).base, parents])
        alike.setdefault(key, []).append(entry)
    for several in alike.values():
        if len(several) < 2:
            continue
        job, own = several[0].job, several[0].store
        stages = stages_of(job, own)
        deployment = Deployment(stages)
        with own.lock(WAIT):
            for parent in job.parents:
                folder, known = stages.parent(parent)
                stages.outputs(parent)
                deployment.export(parent.name, folder, known)
