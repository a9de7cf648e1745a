"""The command line on a recipe that can't be run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_recipe

from slimfuse import cli


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `slimfuse compress` and return its one error; it must leave nothing behind."""

    def run(content: dict[str, Any] | Path, *more: str, untouched: bool = True) -> str:
        path = (
            content
            if isinstance(content, Path)
            else write_recipe(tmp_path / "recipe.yaml", content)
        )
        out = tmp_path / "run"
        monkeypatch.setattr(
            sys, "argv", ["slimfuse", "compress", str(path), "--out", str(out), *more]
        )
        with pytest.raises(SystemExit) as done:
            cli.main()
        shown = capsys.readouterr()
        text = shown.err[shown.err.find("error:") :]
        assert done.value.code == 2, shown.err
        assert shown.err.count("error:") == 1 and "Traceback" not in shown.err
        assert shown.out == ""
        assert not [n for n in ("model", "report.json", "report.html") if (out / n).exists()]
        if untouched:
            assert not out.is_dir(), "the error was known before any work"
        return text

    return run
