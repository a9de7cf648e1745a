"""Files of Debian packages: read where one is installed, else from the user's cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

from slimfuse.data.cache import fill
from slimfuse.errors import DataError


def find_files(
    title: str, files: Collection[str], *, package: str, system: Path, cache: Path
) -> Path:
    """Return the folder that has all `files`: `system`, `cache`, or `cache` filled just now.

    title: what the data set is called; package: the Debian package that puts `files` in `system`.
    It is fetched with apt-get and unpacked with dpkg-deb: no root needed. Raises DataError.
    """
    for folder in (system, cache):
        if all((folder / name).is_file() for name in files):
            return folder
    return _fetch(title, package, system, cache)


def _fetch(title: str, package: str, system: Path, target: Path) -> Path:
    hint = f"install the Debian package ({package}), or set data.path to a folder with its files"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DataError(f"{title} was not found", where=str(system), hint=hint)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o777)  # apt drops its rights before it writes here
        try:
            _run(["apt-get", "download", package], scratch)
            deb = next(Path(scratch).glob("*.deb"))
            _run(["dpkg-deb", "-x", str(deb), scratch], scratch)
        except (subprocess.SubprocessError, StopIteration) as error:
            raise DataError(
                f"{title} is not installed and could not be fetched with apt-get ({error})",
                where=str(system),
                hint=f"run `apt-get update` once; or {hint}",
            ) from error
        unpacked = Path(scratch) / system.relative_to("/")
        return fill(target, lambda folder: _copy(unpacked, folder), replace=True)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _run(command: list[str], folder: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)


def read_file(title: str, file: Path, sha256: str) -> bytes:
    """Return a file's bytes; raises DataError where it is missing or has another sha256."""
    if not file.is_file():
        raise DataError(f"a {title} file is missing", where=str(file))
    return checked(title, file, file.read_bytes(), sha256)


def checked(title: str, file: Path | str, content: bytes, sha256: str) -> bytes:
    """Return a file's bytes as they are; raises DataError where they have another sha256."""
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise DataError(
            f"a {title} file is not the published one",
            where=str(file),
            got=f"sha256 {got[:12]}…",
            allowed=f"sha256 {sha256[:12]}…",
        )
    return content
