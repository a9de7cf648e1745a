"""The run folder: content-addressed stages, atomic writes, one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slimfuse.errors import StorageError
from slimfuse.processes import ALONE, Team

MANIFEST = "manifest.json"
LOCK, LOG = "recipe.lock.yaml", "log.jsonl"
RESULTS = ("report.json", "report.html", "model")
HELD = ".held"  # the folder of the locks of a crowded store's stages
KEY_LENGTH = 16
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINTS = "checkpoint*.safetensors"
"""The files of an unfinished stage that the next run may go on from; most have only the first."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOENT, errno.ENAMETOOLONG, errno.EIO,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder and the key that stands for everything it was made from.

    files: sha256 of each file, by its path in the folder. seconds: the time its making took.
    """

    name: str
    key: str
    path: Path
    files: Mapping[str, str]
    seconds: float


class Store:
    """The stages of one run folder.

    A stage is built in `stages/NAME-KEY.partial` and renamed when it is whole, so a folder
    without that suffix is finished by construction. Of what a killed run left in the partial
    folder only checkpoints stay for the next one, which may go on from them. In several processes
    (`team`) the main one writes, and all have to ask for the same stages in the same order.
    among: a store whose stages this one shares; its results are its own. crowded: whether other
    processes build stages here at the same time: each stage is then held while it is built.
    """

    def __init__(
        self,
        root: Path,
        among: Store | None = None,
        team: Team = ALONE,
        *,
        crowded: bool = False,
    ) -> None:
        self.root = root
        self.crowded: bool = crowded if among is None else among.crowded
        self.team: Team = team if among is None else among.team
        self.stages: Path = root / "stages" if among is None else among.stages
        # by key: files are hashed once a process
        self._checked: dict[str, Stage] = {} if among is None else among._checked
        self._used: dict[str, Stage] = {}

    def check_ours(self, lock: str = LOCK, results: Sequence[str] = RESULTS) -> None:
        """Raise StorageError where the folder's results are not a run's: we would replace them."""
        names = (lock, "stages", LOG, *results)
        there = {name for name in names if os.path.lexists(self.root / name)}
        if lock in there or {"stages", LOG} <= there:
            return
        foreign = [name for name in results if name in there]
        if foreign:
            raise StorageError(
                "the folder is not a run folder, and holds files that a run would replace",
                where=str(self.root),
                got=", ".join(foreign),
                hint="choose another folder with --out",
            )

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], None],
        *,
        together: bool = False,
    ) -> Stage:
        """Return the stage made from `inputs`, calling `build(folder)` unless it exists.

        inputs: JSON values; together with the name they are the stage's address. together: whether
        all processes build, of which only the main one may write into the folder.
        """
        key = digest({"stage": name, **inputs})[:KEY_LENGTH]
        if key in self._checked:
            return self._use(self._checked[key])
        final = self.stages / f"{name}-{key}"
        with self._holding(final.name):
            manifest = self.team.told(lambda: self._manifest(final))
            if manifest is None:
                making = _Making(self, name, key, inputs, final)
                with writing(self.stages.parent):
                    if together:
                        self.team.told(making.begin)
                        build(making.partial)
                        self.team.wait()
                        manifest = self.team.told(making.finish)
                    else:
                        manifest = self.team.told(lambda: making.whole(build))
                self.log(name, "done", key=key, seconds=manifest["seconds"])
            else:
                self.log(name, "cached", key=key)
        stage = Stage(name, key, final, manifest["files"], float(manifest["seconds"]))
        if self.team.size == 1 or not self.team.alone:  # the others know of it, too
            self._checked[key] = stage
        return self._use(stage)

    @contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        """Hold a stage in a crowded store, waiting for another process that builds it."""
        if not self.crowded:
            yield
            return
        folder = self.stages.parent / HELD
        with writing(self.stages.parent):
            folder.mkdir(parents=True, exist_ok=True)
            held = FileLock(folder / name)
            held.acquire()
        try:
            yield
        finally:
            held.release()

    def _use(self, stage: Stage) -> Stage:
        self._used[stage.key] = stage
        return stage

    def _manifest(self, folder: Path) -> dict[str, Any] | None:
        """Return a finished stage's manifest; a stage whose files were altered is removed."""
        if not folder.exists():
            return None
        altered = [MANIFEST]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            files, _ = manifest["files"], float(manifest["seconds"])
            altered = [name for name, sha256 in files.items() if not _is(folder / name, sha256)]
            if not altered:
                return manifest
        self.log(folder.name, "altered", files=altered)
        _remove(folder)
        return None

    def publish(self, stage: Stage, name: str) -> Path:
        """Copy a stage's files (without manifest) to `root/name`, replacing it in one step."""
        target = self.root / name
        with writing(self.stages.parent):
            there = {f.relative_to(target).as_posix() for f in _files(target)}
            if there == stage.files.keys() and all(
                _is(target / file, sha256) for file, sha256 in stage.files.items()
            ):
                return target
            partial = _emptied(self.stages / f"publish-{name}.partial")
            for file in stage.files:
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(stage.path / file, partial / file)
            _sync(partial)
            self.withdraw(name)
            partial.rename(target)
        return target

    def withdraw(self, *names: str) -> None:
        """Remove published files or folders, so that nothing old looks like this run's result."""
        with writing(self.stages.parent):
            for name in names:
                target, doomed = self.root / name, self.stages / f"withdraw-{name}.partial"
                _remove(doomed)
                if target.is_dir():
                    doomed.parent.mkdir(exist_ok=True)
                    target.rename(doomed)  # in one step: never half a folder under its name
                    _remove(doomed)
                else:
                    target.unlink(missing_ok=True)

    def timings(self) -> dict[str, float]:
        """Return the seconds that each stage used so far took to make, in this run or before."""
        return {stage.name: stage.seconds for stage in self.used}

    @property
    def used(self) -> tuple[Stage, ...]:
        """The stages that were asked for so far."""
        return tuple(self._used.values())

    def used_bytes(self, lock: str, name: str = LOCK) -> int:
        """Return the bytes of stages that the run with this lock has made; 0 for another run.

        name: of the file that holds the lock.
        """
        file = self.root / name
        if not file.is_file() or file.read_bytes() != lock.encode():
            return 0
        since = file.stat().st_mtime_ns
        found = (f.stat() for f in _files(self.stages))
        return sum(stat.st_size for stat in found if stat.st_mtime_ns >= since)

    def log(self, stage: str, event: str, **more: Any) -> None:
        """Append one event to log.jsonl."""
        if not self.team.main:
            return
        line = {"time": round(time.time(), 3), "stage": stage, "event": event, **more}
        with writing(self.root), (self.root / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def lock(self, wait: float = 0.0) -> Iterator[None]:
        """Hold the run folder; raises StorageError when another run does, after `wait` seconds."""
        held: list[FileLock] = []
        self.team.told(lambda: held.append(self._acquired(wait)))
        try:
            yield
        finally:
            for lock in held:
                lock.release()

    def _acquired(self, wait: float) -> FileLock:
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / ".lock")
            try:
                lock.acquire(timeout=wait)
            except Timeout as error:
                raise StorageError(
                    "another slimfuse process works in this run folder",
                    where=str(self.root),
                    hint="wait for it, or choose another folder with --out",
                ) from error
        return lock


class _Making:
    """A stage on its way: begun in a partial folder, finished under its name."""

    def __init__(
        self, store: Store, name: str, key: str, inputs: Mapping[str, Any], final: Path
    ) -> None:
        self.store, self.name, self.key, self.inputs, self.final = store, name, key, inputs, final
        self.partial = final.with_name(final.name + ".partial")
        self.start = time.monotonic()

    def begin(self) -> None:
        """Make the partial folder."""
        _emptied(self.partial, keep=CHECKPOINTS)
        self.store.log(self.name, "start", key=self.key)

    def finish(self) -> dict[str, Any]:
        """Give the stage its name and return its manifest."""
        checkpoints = list(self.partial.glob(CHECKPOINTS))
        files = {
            f.relative_to(self.partial).as_posix(): file_digest(f)
            for f in _files(self.partial)
            if f not in checkpoints
        }
        seconds = round(time.monotonic() - self.start, 3)
        manifest = {"inputs": self.inputs, "files": files, "seconds": seconds}
        write_text(self.partial / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        _sync(self.partial)
        for file in checkpoints:
            file.unlink()  # so late: a kill loses no training
        self.partial.rename(self.final)
        return manifest

    def whole(self, build: Callable[[Path], None]) -> dict[str, Any]:
        """Make the stage in one go."""
        self.begin()
        build(self.partial)
        return self.finish()


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one clear StorageError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError):
            raise
        # safetensors raises an error of its own that has no errno
        if _errno(error) in _FULL or "No space left on device" in str(error):
            raise StorageError(
                "the disk is full; what was finished is kept",
                where=str(where),
                hint="free some space and run the same command again: it goes on from here",
            ) from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN and _below(error, where):
            raise StorageError(
                "this can't be written",
                where=str(where),
                got=str(error.strerror),
                hint="make it writable, or choose another folder with --out",
            ) from error
        raise


def _errno(error: Exception) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _below(error: OSError, where: Path) -> bool:
    """Tell a fault of the run folder from one of a file that was read elsewhere."""
    if error.filename is None:
        return True
    file = Path(os.fsdecode(error.filename))
    return file in (where, *where.parents) or where in file.parents


def _emptied(folder: Path, *, keep: str | None = None) -> Path:
    """Return `folder`, existing, with nothing in it but files whose names are like `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if keep is None or not entry.match(keep):
            _remove(entry)
    return folder


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _is(file: Path, sha256: str) -> bool:
    return file.is_file() and file_digest(file) == sha256


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder` (or its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all; raises StorageError."""
    if path.is_dir():
        raise StorageError("a file is to be written here", where=str(path), got="a folder")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Flush a folder's files to disk, so that a rename never outlives its content."""
    for file in _files(folder):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
