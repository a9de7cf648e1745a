"""One candidate of a sweep, as a machine of a cluster makes it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from slimfuse.errors import UserError
from slimfuse.pipeline.candidates import Candidate
from slimfuse.pipeline.lock import lock_text
from slimfuse.pipeline.run import quiet
from slimfuse.pipeline.sweep_machines import WAIT
from slimfuse.pipeline.sweep_verb import made_of, opened
from slimfuse.store import LOCK, Store


def hello() -> None:
    """Do nothing: that this module could be imported is the answer."""


def make_candidate(
    *, recipe: str, cwd: str, root: str, name: str, overrides: Sequence[str], threads: int
) -> None:
    """Make one candidate's stages in the sweep's folder, as far as they aren't there yet.

    recipe: its path, from the folder `cwd`; root: the sweep's folder, where the candidate's own one
    holds its lock already; threads: as the machine that drives the sweep has resolved them.
    Raises UserError where the inputs or versions here are other ones than there.
    """
    quiet()
    if not Path(cwd).is_dir():
        raise UserError(
            "a machine of the Ray cluster doesn't see the folder that the sweep was started in",
            got=cwd,
            hint="start it in a folder that all machines share, under the same path",
        )
    os.chdir(cwd)  # the recipe's paths may be relative to it
    store = Store(Path(root), crowded=True)
    entry = opened(Path(recipe), [Candidate(name, tuple(overrides))], store)[0]
    entry = replace(entry, job=replace(entry.job, threads=threads))
    _check_alike(lock_text(entry.job), entry.store.root / LOCK)
    torch.set_num_threads(threads)
    made_of(entry, WAIT)


def _check_alike(own: str, file: Path) -> None:
    """Raise UserError where this machine would make another run than the sweep wants."""
    wanted = file.read_text(encoding="utf-8")
    if own == wanted:
        return
    here, there = own.splitlines(), wanted.splitlines()
    raise UserError(
        "a machine of the Ray cluster has other inputs or versions than the one that sweeps",
        where=socket.gethostname(),
        got="; ".join([line.strip() for line in here if line not in there][:3]),
        allowed="; ".join([line.strip() for line in there if line not in here][:3]),
        hint="give every machine the same files and the same versions",
    )
