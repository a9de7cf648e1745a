"""Folders that several test files look at, made once for all processes of a test session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

WORKER = "PYTEST_XDIST_WORKER"
"""What pytest-xdist sets in its processes, each of which has a folder beside the others'."""


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all processes of this test session see."""
    own = factory.getbasetemp()
    return own.parent if WORKER in os.environ else own


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first process to ask has made; others wait for it.

    make: gets the folder's path, which is where it will stay, and where nothing is yet.
    """
    root = session_folder(factory) / "shared"
    root.mkdir(exist_ok=True)
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            make(folder)
            done.touch()
    return folder
