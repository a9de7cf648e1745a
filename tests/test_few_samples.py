"""Data that a run could not be measured on are refused before any work, in words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_text
from tiny_run import write_recipe

from slimfuse import cli

HEAD = "text,label\n"


@pytest.fixture
def says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Write train.csv and test.csv, run `slimfuse compress` and return its one message."""

    def run(train: str, test: str, task: str, labels: Any = ("x",), **data: Any) -> str:
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "train.csv").write_text(train)
        (folder / "test.csv").write_text(test)
        parent = tiny_text.save_parent(tmp_path / "a", classes=labels)
        content = tiny_text.recipe(folder, [parent], task=task)
        content["data"] |= data
        path = write_recipe(tmp_path / "recipe.yaml", content)
        out = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["slimfuse", "compress", str(path), "--out", str(out)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert done.value.code == 2 and not out.exists()
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    return run


def texts(count: int, label: str = "1.5") -> str:
    return HEAD + "".join(f"the cat and {'old ' * i}dog,{label}\n" for i in range(count))


@pytest.mark.parametrize("task", ["sentence-embedding", "feature-extraction"])
def test_ten_nearest_are_looked_up_among_twenty(says: Callable[..., str], task: str) -> None:
    text = says(texts(30), texts(19), task)
    for words in ("too small to measure", "recipe.yaml:", "data.test_split", "19 texts",
                  "at least 20: the 10 nearest", "next:"):  # fmt: skip
        assert words in text


def test_a_limit_that_is_too_low_is_named(says: Callable[..., str]) -> None:
    text = says(texts(30), texts(30), "sentence-embedding", limit={"test": 5})
    for words in ("recipe.yaml:", "data.limit.test", "5 texts", "raise the limit"):
        assert words in text


def test_a_rank_of_two_numbers_is_none(says: Callable[..., str]) -> None:
    text = says(texts(30), texts(2), "text-classification", label_kind="regression")
    for words in ("too small to measure", "2 texts", "at least 4", "next:"):
        assert words in text


def test_rows_without_a_label_are_named_by_file_and_line(says: Callable[..., str]) -> None:
    bad = texts(3, "x") + "the axe,\nmoss,x\n"
    text = says(texts(30, "x"), bad, "text-classification")
    for words in ("split 'test' has rows without a label", "data/test.csv:5",
                  "1 of 5 rows", "allowed: a label in every row", "next:"):  # fmt: skip
        assert words in text


def test_an_empty_table_is_named(says: Callable[..., str]) -> None:
    text = says(texts(30, "x"), "", "text-classification")
    for words in ("the table is empty", "data/test.csv:1", "got:", "allowed:", "data.test_split"):
        assert words in text
