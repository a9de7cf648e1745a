"""The run folder: content-addressed stages, atomic writes, one process at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slimfuse.errors import StorageError

MANIFEST = "manifest.json"
KEY_LENGTH = 16


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder and the key that stands for everything it was made from."""

    name: str
    key: str
    path: Path
    seconds: float


class Store:
    """The stages of one run folder.

    A stage is built in `stages/NAME-KEY.partial` and renamed when it is whole, so a folder
    without that suffix is finished by construction. What a killed run left in the partial folder
    stays there for the next one, which may go on from it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], None]) -> Stage:
        """Return the stage made from `inputs`, calling `build(folder)` unless it exists.

        inputs: JSON values; together with the name they are the stage's address.
        """
        key = digest({"stage": name, **inputs})[:KEY_LENGTH]
        final = self.root / "stages" / f"{name}-{key}"
        manifest = self._manifest(final)
        if manifest is None:
            start = time.monotonic()
            partial = final.with_name(final.name + ".partial")
            with writing(partial):
                partial.mkdir(parents=True, exist_ok=True)
                self.log(name, "start", key=key)
                build(partial)
                files = {
                    str(f.relative_to(partial)): file_digest(f)
                    for f in sorted(partial.rglob("*"))
                    if f.is_file()
                }
                seconds = round(time.monotonic() - start, 3)
                manifest = {"inputs": inputs, "files": files, "seconds": seconds}
                write_text(partial / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
                _sync(partial)
                partial.rename(final)
            self.log(name, "done", key=key, seconds=seconds)
        else:
            self.log(name, "cached", key=key)
        return Stage(name, key, final, float(manifest["seconds"]))

    def has(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Return whether the stage is finished already."""
        key = digest({"stage": name, **inputs})[:KEY_LENGTH]
        return self._manifest(self.root / "stages" / f"{name}-{key}") is not None

    def _manifest(self, folder: Path) -> dict[str, Any] | None:
        """Return a finished stage's manifest; a stage whose files were altered is removed."""
        if not (folder / MANIFEST).is_file():
            return None
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            file = folder / name
            if not file.is_file() or file_digest(file) != expected:
                self.log(folder.name, "altered", file=name)
                shutil.rmtree(folder)
                return None
        return manifest

    def publish(self, folder: Path, name: str) -> Path:
        """Copy a stage's content (without manifest) to `root/name`, replacing it in one step."""
        target, partial = self.root / name, self.root / f"{name}.partial"
        with writing(partial):
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(MANIFEST))
            _sync(partial)
            self.withdraw(name)
            partial.rename(target)
        return target

    def withdraw(self, *names: str) -> None:
        """Remove published files or folders, so that nothing old looks like this run's result."""
        for name in names:
            target = self.root / name
            if target.is_dir():
                doomed = target.with_name(f"{name}.old")
                shutil.rmtree(doomed, ignore_errors=True)
                target.rename(doomed)
                shutil.rmtree(doomed)
            else:
                target.unlink(missing_ok=True)

    def log(self, stage: str, event: str, **more: Any) -> None:
        """Append one event to log.jsonl."""
        line = {"time": round(time.time(), 3), "stage": stage, "event": event, **more}
        with writing(self.root), (self.root / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder; raises StorageError when another process does."""
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            held = FileLock(self.root / ".lock")
            try:
                held.acquire(timeout=0)
            except Timeout as error:
                raise StorageError(
                    "another slimfuse process works in this run folder",
                    where=str(self.root),
                    hint="wait for it, or choose another folder with --out",
                ) from error
        try:
            yield
        finally:
            held.release()


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one clear StorageError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise StorageError(
                "the disk is full; what was finished is kept",
                where=str(where),
                hint="free some space and run the same command again: it goes on from here",
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise StorageError(
                "the folder can't be written", where=str(where), got=str(error.strerror)
            ) from error
        raise


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder` (or its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
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
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
