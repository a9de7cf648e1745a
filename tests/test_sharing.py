"""What one process of a test session has made, the others find; files that are run first exist."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from longest import LONGEST
from pages import HOME
from sharing import WORKER, once, session_folder


class Factory:
    """A temporary folder's maker, as every worker has one."""

    def __init__(self, base: Path) -> None:
        self.base = base
        base.mkdir(exist_ok=True)

    def getbasetemp(self) -> Path:
        return self.base


def test_workers_share_a_folder_that_one_of_them_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKER, "gw0")
    workers: list[Any] = [Factory(tmp_path / name) for name in ("gw0", "gw1")]
    assert {session_folder(worker) for worker in workers} == {tmp_path}
    made: list[Path] = []
    begun = threading.Event()

    def make(folder: Path) -> None:
        made.append(folder)
        begun.set()
        folder.mkdir()
        (folder / "whole").touch()

    first = threading.Thread(target=lambda: once(workers[0], "x", make))
    first.start()
    begun.wait(60)
    found = once(workers[1], "x", make)  # waits for the other
    first.join()
    assert made == [found] and (found / "whole").exists()


def test_a_folder_that_failed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WORKER, raising=False)
    alone: Any = Factory(tmp_path)

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise ValueError("not made")

    with pytest.raises(ValueError, match="not made"):
        once(alone, "x", fail)
    assert once(alone, "x", Path.mkdir).is_dir()


def test_the_longest_files_are_there() -> None:
    assert len(set(LONGEST)) == len(LONGEST)
    assert not [name for name in LONGEST if not (HOME / name).is_file()]
