"""Debian packages that are not installed: fetched and unpacked by stand-ins of apt and dpkg."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimfuse.data import debian
from slimfuse.errors import DataError


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an `apt-get` and a `dpkg-deb` first on the path that make a package of one file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "apt-get": 'test "$1 $2" = "download some-data" && echo packed > some-data_1_all.deb',
        "dpkg-deb": 'mkdir -p "$3/usr/share/some-data" && cp "$2" "$3/usr/share/some-data/file"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def find(cache: Path) -> Path:
    system = Path("/usr/share/some-data")
    return debian.find_files("Some", ["file"], package="some-data", system=system, cache=cache)


def test_a_package_is_unpacked_into_the_cache_once(tools: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "some"
    assert find(cache) == cache
    assert (cache / "file").read_text() == "packed\n"
    assert list(cache.parent.iterdir()) == [cache]
    (tools / "apt-get").write_text("#!/bin/sh\nexit 1\n")
    assert find(cache) == cache


def test_a_fetch_that_fails_leaves_nothing_and_tells_the_next_step(
    tools: Path, tmp_path: Path
) -> None:
    (tools / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    with pytest.raises(DataError, match="could not be fetched with apt-get") as caught:
        find(tmp_path / "cache" / "some")
    assert "apt-get update" in str(caught.value.hint)
    assert "some-data" in str(caught.value.hint)
    assert not (tmp_path / "cache").exists()
