"""The tutorials, followed word by word: every file is saved, every command run, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import HOME, Fenced, fenced

TUTORIALS = sorted((HOME / "docs").glob("tutorial-*.md"))
NAMED = re.compile(r"# ([\w-]+\.(?:py|yaml))\b")
SET_UP = ("make install", ". .venv/bin/activate")
"""Commands that make the environment, which a test has already."""


def follow(block: Fenced, folder: Path, environment: dict[str, str]) -> None:
    """Save a named file, or run commands; raises AssertionError where one ends with an error."""
    named = NAMED.match(block.text)
    if block.language in ("python", "yaml"):
        assert named, f"{block}: says no file to save it as"
        (folder / named[1]).write_text(block.text)
    elif block.language == "sh" and not block.text.startswith(SET_UP):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}:\n{block.text}{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_followed_word_by_word(page: Path, tmp_path: Path) -> None:
    binaries = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(HOME), str(HOME / "export")]),
        "OMP_NUM_THREADS": "1",
    }
    for block in fenced(page):
        follow(block, tmp_path, environment)
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


def test_a_block_that_fails_is_told(tmp_path: Path) -> None:
    def block(language: str, text: str) -> Fenced:
        return Fenced(HOME / "docs" / "x.md", 1, language, text)

    follow(block("yaml", "# a.yaml\nx: 1\n"), tmp_path, {})
    follow(block("sh", "test -f a.yaml\n"), tmp_path, dict(os.environ))
    with pytest.raises(AssertionError, match=r"x\.md:1"):
        follow(block("sh", "false | true\n"), tmp_path, dict(os.environ))
    with pytest.raises(AssertionError, match="no file"):
        follow(block("python", "x = 1\n"), tmp_path, {})
