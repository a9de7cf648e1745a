"""Run folders that can't be used, and disks that are full: one clear error."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from errors.saying import says
from filelock import FileLock
from safetensors import SafetensorError
from tiny_run import recipe

from slimfuse.errors import StorageError
from slimfuse.finetune import checkpoint, loop
from slimfuse.pipeline import compress
from slimfuse.pipeline import run as story
from slimfuse.store import Store


def test_run_folder_that_is_held_by_another_run(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        text = fails(recipe(), untouched=False)
    says(text, ("another slimfuse process", str(tmp_path / "run"), "--out"))


def test_run_folder_that_is_a_file(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    says(fails(recipe()), ("can't be written", str(tmp_path / "run"), "got:", "next:"))


@pytest.mark.parametrize("name", ["model", "report.json", "report.html"])
def test_a_folder_of_someone_else_is_left_alone(
    tiny_recipe: Path, tmp_path: Path, name: str
) -> None:
    root = tmp_path / "mine"
    file = root / name / "weights.bin" if name == "model" else root / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    for own in ("model.old", "stages"):
        (root / own).mkdir()
    before = sorted(root.rglob("*"))
    with pytest.raises(StorageError, match="not a run folder") as error:
        compress(tiny_recipe, out=root)
    assert error.value.got == name and error.value.where == str(root)
    assert file.read_text() == "precious" and sorted(root.rglob("*")) == before


def test_run_folder_below_a_file(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    text = fails(recipe(), "--out", str(tmp_path / "file" / "run"))
    says(text, ("can't be written", "Not a directory", "--out"))


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small disk, seen by this process alone; it goes when the process goes."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root's rights")
    handle = os.open(folder, os.O_RDONLY)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    try:
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def test_disk_that_is_too_small_is_known_before_any_work(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "size=256k") as disk:
        text = fails(recipe(), "--out", str(disk / "run"))
        assert list(disk.iterdir()) == []
    says(text, ("the disk is too full", str(disk / "run"), "MiB free", "allowed: about", "next:"))


def test_disk_that_fills_up_during_the_run(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "check_disk", lambda *_: None)
    with small_disk(tmp_path / "disk", "size=256k") as disk:
        text = fails(recipe(), "--out", str(disk / "run"), untouched=False)
        says(text, ("the disk is full", str(disk / "run"), "run the same command again"))
        kept = {f.name for f in (disk / "run").iterdir()}
        assert "stages" in kept and not kept & {"model", "report.json", "report.html"}
        assert list((disk / "run" / "stages").glob("parent-a-*[0-9a-f]")), "finished, so kept"


def test_read_only_disk(fails: Callable[..., str], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "ro,size=64m") as disk:
        text = fails(recipe(), "--out", str(disk / "run"))
    says(text, ("can't be written", "Read-only file system", "next:"))


def test_disk_that_is_full_when_a_checkpoint_is_written(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        # what safetensors raises: no OSError
        raise SafetensorError('IoError(Os { code: 28, message: "No space left on device" })')

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        compress(tiny_recipe, out=tmp_path / "run")


def test_unreadable_file_elsewhere_is_not_blamed_on_the_run_folder(tmp_path: Path) -> None:
    def build(_folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/file")

    with pytest.raises(PermissionError):
        Store(tmp_path).stage("x", {}, build)
