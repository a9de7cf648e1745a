"""A recipe's data: what goes with a source and its labels, and texts opened for a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text
import torch

from slimfuse.data import Split, TextData
from slimfuse.errors import DataError
from slimfuse.families import family_of
from slimfuse.pipeline import texts
from slimfuse.pipeline.texts import Texts, load, open_texts
from slimfuse.recipe.inputs import Data
from slimfuse.tasks import TASKS


def findings(**raw: Any) -> list[tuple[str, str, str | None]]:
    return [(".".join(map(str, f.loc)), f.what, f.allowed) for f in Data.cross_check(raw)]


@pytest.mark.parametrize(
    "raw",
    [
        {"source": "anarchism"},
        {"source": "vader", "label_kind": "regression", "path": "x"},
        {"source": "wordnet", "label_kind": "single"},
        {"source": "textfolder", "path": "x", "text_unit": "paragraph"},
        {"source": "textfolder", "path": "x", "label_kind": "multi", "label_separator": ";"},
        {"source": "textfolder", "path": "x", "label_kind": "multi", "label_columns": ["a", "b"]},
        {"source": "datasets", "path": "x", "label_kind": "regression", "label_column": "score"},
        {"source": "nonsense", "label_columns": []},
    ],
    ids=str,
)
def test_keys_that_go_together(raw: dict[str, Any]) -> None:
    assert findings(**raw) == []


NEVER = "no such key"


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ({"source": "anarchism", "text_column": "t"},
         ("text_column", "source 'anarchism' takes no text_column", NEVER)),
        ({"source": "vader", "label_kind": "single"},
         ("label_kind", "source 'vader' has no such labels", "null or regression")),
        ({"source": "imagefolder", "path": "x", "label_kind": "multi"},
         ("label_kind", "source 'imagefolder' has no such labels", "null or single")),
        ({"source": "datasets", "path": "x", "text_unit": "paragraph"},
         ("text_unit", "source 'datasets' takes no text_unit", NEVER)),
        ({"source": "textfolder", "path": "x", "label_separator": ";"},
         ("label_separator", "goes only with label_kind 'multi'", NEVER)),
        ({"source": "textfolder", "path": "x", "label_kind": "regression", "label_columns": ["a"]},
         ("label_columns", "goes only with label_kind 'multi'", NEVER)),
        ({"source": "textfolder", "path": "x", "label_kind": "multi", "label_columns": ["a"],
          "label_column": "b"},
         ("label_column", "stands beside label_columns", "one of the two")),
        ({"source": "textfolder", "path": "x", "label_kind": "multi", "label_columns": ["a"],
          "label_separator": ";"},
         ("label_separator", "stands beside label_columns", "one of the two")),
        ({"source": "textfolder"},
         ("path", "missing key: source 'textfolder' needs it", None)),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_do_not_go_together(raw: dict[str, Any], wanted: tuple[str, str, str]) -> None:
    assert findings(**raw) == [wanted]


def test_what_a_label_is_follows_the_source() -> None:
    assert Data.model_validate({"source": "vader"}).kind == "regression"
    assert Data.model_validate({"source": "wordnet"}).kind == "single"
    given = {"source": "textfolder", "path": "x", "label_kind": "multi"}
    assert Data.model_validate(given).kind == "multi"


def ready(kind: Any) -> TextData:
    labels = np.zeros(3, dtype=np.int64)
    split = Split(["a", "b", "c"], labels)
    return TextData("it", split, split, ("x",) if kind == "single" else (), "mark", kind=kind)


def test_labels_are_left_out_where_the_task_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_text.save_texts(tmp_path / "set", (9, 6))
    spec = Data.model_validate({"source": "textfolder", "path": "set", "label_column": "label"})
    assert load(spec, tmp_path).classes == tiny_text.CLASSES
    assert load(spec, tmp_path, labels=False).kind == "none"
    for split in ("train", "test"):
        file = folder / f"{split}.csv"
        file.write_text(file.read_text().replace("text,label", "text,topic"))
    assert load(spec, tmp_path, labels=False).kind == "none"
    monkeypatch.setitem(texts.READY, "wordnet", lambda path: ready("single"))
    words = Data.model_validate({"source": "wordnet"})
    assert load(words, tmp_path).kind == "single"
    assert load(words, tmp_path, labels=False).kind == "none"


def test_prose_has_no_labels_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(texts.READY, "anarchism", lambda path: ready("none"))
    spec = Data.model_validate({"source": "anarchism", "limit": {"train": 2}})
    assert len(load(spec, tmp_path, labels=False).train) == 2
    with pytest.raises(DataError, match="the texts have no labels") as caught:
        load(spec, tmp_path)
    assert caught.value.where == "data.source"


def opened(tmp_path: Path, task: str, **keys: Any) -> Texts:
    tiny_text.save_texts(tmp_path / "set", (60, 30))
    folder = tiny_text.save_parent(tmp_path / "a")
    family = family_of("gpt2" if task == "causal-lm" else "bert", task)
    config: Any = type(
        "Config", (), {"max_position_embeddings": tiny_text.POSITIONS, "vocab_size": 100}
    )
    spec = Data.model_validate({"source": "textfolder", "path": "set", **keys})
    made: Any = TASKS[task]
    return open_texts(spec, family, {"a": folder}, {"a": config}, tmp_path, made)  # type: ignore[arg-type]


def test_joined_texts_are_blocks_of_the_length_asked_for(tmp_path: Path) -> None:
    found = opened(tmp_path, "causal-lm", max_length=10)
    assert found.data.kind == "none" and found.task.joins
    assert found.tokens(None) == 10
    ids = found.example.arguments["input_ids"]
    assert ids.shape == (2, 10) and not torch.equal(ids[0], ids[1])
    written = sum(len(text) for text in (*found.data.train.items, *found.data.test.items))
    assert 0 < found.cached_bytes < 4 * written


def test_blocks_are_no_longer_than_the_parents_take_nor_than_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened(tmp_path / "1", "causal-lm").task.length == 24
    monkeypatch.setattr(texts, "BLOCK", 16)
    assert opened(tmp_path / "2", "causal-lm").task.length == 16
    assert opened(tmp_path / "3", "text-classification").task.length == 24
