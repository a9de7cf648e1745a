"""The user's own folder for what was fetched or converted once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the per-user folder of this name, below XDG_CACHE_HOME where that is set."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slimfuse" / name


def fill(target: Path, make: Callable[[Path], None], *, replace: bool = False) -> Path:
    """Return `target`, a folder that `make` has filled; never half of it.

    It is filled under another name beside its place and then renamed. Where a folder stands there
    by then, another process was faster, and its folder stays. replace: ours takes its place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        staged = Path(scratch) / target.name
        staged.mkdir()
        make(staged)
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        try:
            staged.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target
