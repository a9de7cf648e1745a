"""`reproduce`: a run made again from its lock in another folder, and its figures compared."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from slimfuse.errors import DataError, ParentError, ShapeError, UserError
from slimfuse.families import Shape
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.lock import HIDDEN, lock_of, lock_text, origins_in, without_machine_paths
from slimfuse.pipeline.planning import check_disk
from slimfuse.pipeline.reproduce_figures import Compared, Differing, compare_reports, differing
from slimfuse.pipeline.run import (
    Run,
    planned_of,
    prepare_pinned,
    prepared,
    quiet,
    run_job,
    write_lock,
)
from slimfuse.processes import alone
from slimfuse.recipe import Located, Recipe, load_located, load_locked
from slimfuse.report import Report, from_json
from slimfuse.store import LOCK, Store, file_digest

SUFFIX = "-reproduced"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Reproduction:
    """A run that was made again: the new one, each figure then and now, and what else differs.

    figures: see `compare_reports`; conditions: versions and the machine, where they differ.
    """

    original: Path
    run: Run
    figures: tuple[Compared, ...]
    conditions: tuple[Differing, ...]

    @property
    def exact(self) -> bool:
        """Whether machine, threads and versions are the same, so that the bytes must be, too."""
        return not self.conditions

    @property
    def reproduced(self) -> bool:
        """Whether every figure that is judged is what it was."""
        return all(figure.same is not False for figure in self.figures)


@dataclass(frozen=True)
class _Locked:
    """What a finished run left: its lock as plain data, and its report."""

    folder: Path
    lock: dict[str, Any]
    report: Report


def reproduce(
    run: str | Path, *, overrides: tuple[str, ...] = (), out: str | Path | None = None
) -> Reproduction:
    """Make a finished run again from its recipe.lock.yaml, and compare every figure.

    run: its folder, which is only read. overrides: `data.path=…`, `parents.0.from=…`: where
    something is now; a lock keeps no machine's absolute paths, which the recipe tells as long as it
    lies where it did. out: the new run's folder (default RUN-reproduced); a reproduction that was
    killed goes on there. Raises UserError where data, parents or the target's shape aren't those
    of the lock, before any work.
    """
    alone("reproduce")
    quiet()
    locked = _read(Path(run))
    root = Path(out) if out is not None else _beside(locked.folder)
    _check_apart(locked.folder, root)
    store = Store(root)
    store.check_ours()
    loaded, path = _located(locked, overrides)
    job = _job(loaded, path, locked)
    check_same_inputs(locked.lock, lock_of(job), locked.folder / LOCK)
    torch.set_num_threads(job.threads)
    planned, text = planned_of(job), lock_text(job)
    check_disk(planned, store, text)
    words = ["slimfuse", "reproduce", str(run)]
    words += [w for one in overrides for w in ("--set", one)]
    words += ["--out", str(out)] if out is not None else []
    with store.lock():
        write_lock(text, store)
        try:
            made = run_job(job, store, planned, shlex.join(words))
        except UserError as error:
            error.where = loaded.locate(error.where)
            raise
    return compared(locked.folder, locked.report, made)


def compared(original: Path, then: Report, made: Run) -> Reproduction:
    """Return a run's figures beside those of the run whose lock it was made from."""
    conditions = differing(then, made.report)
    files = [folder / "model" / WEIGHTS for folder in (original, made.folder)]
    before, after = (file_digest(file)[:16] if file.is_file() else "none" for file in files)
    same = before == after if not conditions else None
    weights = Compared(f"sha256 of model/{WEIGHTS}", before, after, same)
    figures = compare_reports(then, made.report, exact=not conditions)
    return Reproduction(original, made, (weights, *figures), conditions)


def _beside(folder: Path) -> Path:
    """Return the folder next to a run's, whichever way that is written."""
    if folder.name and folder.name != "..":
        return folder.with_name(folder.name + SUFFIX)
    return folder.resolve().with_name(folder.resolve().name + SUFFIX)


def _check_apart(original: Path, out: Path) -> None:
    here, there = original.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(
            "a reproduction needs a folder of its own",
            where="--out",
            got=str(out),
            allowed=f"a folder that is not {original}, nor in it or around it",
        )


def _read(folder: Path) -> _Locked:
    """Return what a finished run left; raises UserError for any other folder."""
    missing = [name for name in (LOCK, "report.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "this is not the folder of a finished run",
            where=str(folder),
            got=f"no {', no '.join(missing)}",
            hint="give a run's folder, as compress prints it with its report",
        )
    try:
        text = (folder / LOCK).read_text(encoding="utf-8")
        lock = YAML(typ="safe", pure=True).load(text)
        resolved, digests = lock["resolved"], lock["sha256"]
        whole = isinstance(lock["recipe"], dict) and {"data", "parents"} <= {*digests}
        whole = whole and {"threads", "precision", "target"} <= {*resolved}
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(
            "the lock is damaged",
            where=str(folder / LOCK),
            allowed="recipe, resolved, versions and sha256, as slimfuse writes them",
        )
    try:
        report = from_json((folder / "report.json").read_text(encoding="utf-8"))
    except UserError as error:
        error.where = f"{folder / 'report.json'}{f', {error.where}' if error.where else ''}"
        raise
    except UnicodeDecodeError as error:
        raise UserError("this is not JSON", where=str(folder / "report.json")) from error
    return _Locked(folder, lock, report)


def _located(locked: _Locked, overrides: Sequence[str]) -> tuple[Located, Path]:
    """Return the locked recipe with places that hold here, and the path they are relative to."""
    home, changes = _origin(locked.report.command)
    if home is not None:
        with suppress(UserError):  # changed since, or gone: then the lock alone speaks
            loaded = load_located(home, (*changes, *overrides))
            if _alike(loaded, locked):
                return loaded, home
    path = locked.folder / LOCK
    loaded = load_locked(path, overrides)
    if not _alike(loaded, locked):
        raise UserError(
            "a reproduction changes no key, it only may say where something is",
            where=f"--set {overrides[0]}" if overrides else str(path),
            allowed=", ".join(origins_in(copy.deepcopy(locked.lock["recipe"]))),
        )
    values = loaded.recipe.to_lock()
    for key, (place, name) in origins_in(values).items():
        if str(place[name] or "").startswith(HIDDEN):
            raise UserError(
                "the lock doesn't say where this is, and the recipe isn't there any more",
                where=loaded.locate(key),
                got=place[name],
                hint=f"say it: --set {key}=PATH",
            )
    return loaded, home if home is not None else path


def _origin(command: str) -> tuple[Path | None, tuple[str, ...]]:
    """Return the recipe and the overrides of a report's command; None for one that has no recipe.

    A relative place is looked up beside the recipe, even where the file itself is gone.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return None, ()
    if words[:2] != ["slimfuse", "compress"] or len(words) < 3:
        return None, ()
    return Path(words[2]), tuple(value for flag, value in pairwise(words) if flag == "--set")


def _alike(loaded: Located, locked: _Locked) -> bool:
    """Tell whether a recipe is the locked one but for where its inputs are."""
    forms = [without_machine_paths(loaded.recipe.to_lock()), copy.deepcopy(locked.lock["recipe"])]
    for form in forms:
        for place, key in origins_in(form).values():
            place[key] = place[key] is not None
    return bool(forms[0] == forms[1])


def _job(loaded: Located, path: Path, locked: _Locked) -> BaseJob:
    """Return the recipe's job with the lock's threads, precision and, from a latency, shape."""
    resolved, recipe = locked.lock["resolved"], loaded.recipe
    budget = recipe.target.budget if isinstance(recipe, Recipe) else None
    job: BaseJob
    if isinstance(recipe, Recipe) and budget is not None and budget.latency_ratio is not None:
        try:
            job = prepare_pinned(recipe, path, Shape(**resolved["target"]))
        except UserError as error:
            error.where = loaded.locate(error.where)
            raise
    else:
        job = prepared(loaded, path)
    return replace(job, threads=resolved["threads"], precision=resolved["precision"])


def check_same_inputs(then: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Demand the locked data, parents and target; raises UserError naming all that differ."""
    before, after = then["sha256"], now["sha256"]
    parents = sorted({*before["parents"], *after["parents"]})
    names = [p for p in parents if before["parents"].get(p) != after["parents"].get(p)]
    odd = [f"parent {name}'s weights" for name in names]
    odd += ["the data"] if before["data"] != after["data"] else []
    shapes = then["resolved"]["target"], now["resolved"]["target"]
    if not odd and shapes[0] != shapes[1]:
        raise ShapeError(
            "the recipe comes to another shape than it did",
            where=str(where),
            got=_sizes(shapes[1]),
            allowed=_sizes(shapes[0]),
            hint="the lock was made by another version of slimfuse",
        )
    if odd:
        kind = ParentError if names else DataError
        raise kind(
            "what the run was made of has changed",
            where=str(where),
            got=f"another sha256 of {', '.join(odd)}",
            allowed="the inputs that the lock names by their sha256",
            hint="bring them back, or say where they are: --set parents.0.from=…, data.path=…",
        )


def _sizes(target: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in target.items())
