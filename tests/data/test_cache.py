"""The user's cache: folders that are filled at once or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimfuse.data.cache import cache_folder, fill


def test_the_folder_follows_the_users_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("x") == tmp_path / "slimfuse" / "x"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("x") == tmp_path / "home" / ".cache" / "slimfuse" / "x"


def test_a_folder_is_replaced_as_a_whole_and_never_half_filled(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "it"

    def write(folder: Path, name: str, broken: bool = False) -> None:
        (folder / name).write_text("x")
        if broken:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill(target, lambda folder: write(folder, "a", broken=True))
    assert not target.exists() and not list(target.parent.iterdir())
    assert fill(target, lambda folder: write(folder, "a")) == target
    fill(target, lambda folder: write(folder, "b"), replace=True)
    assert [f.name for f in target.iterdir()] == ["b"]
    assert list(target.parent.iterdir()) == [target]


def test_a_process_that_was_faster_keeps_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "it"

    def slow(folder: Path) -> None:
        (folder / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()

    assert [f.name for f in fill(target, slow).iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]
