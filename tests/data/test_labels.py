"""Labels of tables: several classes a row, numbers, none, and what goes wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from slimfuse.data import TextData, load_texts, unlabelled
from slimfuse.errors import DataError

ROWS = [["b", "a"], [], ["c"]]
MARKS = [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def write(folder: Path, **splits: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSON Lines of these rows, each with a text."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = (json.dumps({"text": f"{split} {i}", **row}) for i, row in enumerate(rows))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_csv(folder: Path, header: str, **splits: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [f"text,{header}", *(f"{split} {i},{row}" for i, row in enumerate(rows))]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def load(folder: Path, kind: str, **changes: Any) -> TextData:
    return load_texts(str(folder), folder=True, kind=kind, **changes)  # type: ignore[arg-type]


def check_marks(data: TextData) -> None:
    assert data.classes == ("a", "b", "c") and data.kind == "multi"
    assert data.train.labels.tolist() == MARKS and data.train.labels.dtype == np.float32
    assert data.test.labels.tolist() == [[0, 1, 0]]


def test_several_classes_of_lists_of_separated_names_and_of_columns_are_one(tmp_path: Path) -> None:
    lists = write(tmp_path / "1" / "s", train=[{"label": r} for r in ROWS], test=[{"label": ["b"]}])
    names = write_csv(tmp_path / "2" / "s", "label", train=["b; a", "", "c ;"], test=["b"])
    flags = write_csv(tmp_path / "3" / "s", "a,b,c", train=["1,1,0", "0,0,0", "0,0,1"],
                      test=["0,1,0"])  # fmt: skip
    found = [
        load(lists, "multi"),
        load(names, "multi", separator=";"),
        load(flags, "multi", label_column=("a", "b", "c")),
    ]
    for data in found:
        check_marks(data)
    assert len({data.fingerprint for data in found}) == 1


def test_flags_may_be_numbers_or_truths(tmp_path: Path) -> None:
    rows = [{"a": True, "b": 1, "c": 0.0}, {"a": False, "b": 0, "c": 1.0}]
    data = load(write(tmp_path, train=rows, test=rows), "multi", label_column=("a", "b", "c"))
    assert data.train.labels.tolist() == [[1, 1, 0], [0, 0, 1]]


def typed(folder: Path, names: Mapping[str, Sequence[str]], several: bool) -> Path:
    """Write two splits of class labels (or lists of them) with these names as parquet."""
    folder.mkdir()
    for split, own in names.items():
        label: Any = datasets.ClassLabel(names=list(own))
        label = datasets.List(label) if several else label
        features = datasets.Features(text=datasets.Value("string"), label=label)
        labels: list[Any] = [[0, 1], []] if several else [0, 1]
        rows = {"text": ["x", "y"], "label": labels}
        part = datasets.Dataset.from_dict(rows, features=features)
        part.to_parquet(folder / f"{split}.parquet")
    return folder


def test_lists_of_class_labels_keep_their_names(tmp_path: Path) -> None:
    names = {"train": ["z", "a"], "test": ["z", "a"]}
    data = load_texts(str(typed(tmp_path / "set", names, several=True)), kind="multi")
    assert data.classes == ("z", "a")
    assert data.train.labels.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("several", [False, True], ids=["single", "multi"])
def test_files_that_name_the_classes_differently_are_refused(several: bool, tmp_path: Path) -> None:
    folder = typed(tmp_path / "set", {"train": ["z", "a"], "test": ["a", "z"]}, several)
    with pytest.raises(DataError, match="name the classes differently") as caught:
        load_texts(str(folder), kind="multi" if several else "single")
    assert caught.value.got == "train.parquet has z, a; test.parquet a, z"
    assert load_texts(str(folder), kind="none").classes == ()


def test_numbers_are_read_from_any_table(tmp_path: Path) -> None:
    rows = [{"label": -1.5}, {"label": 3}]
    plain = load(write(tmp_path / "1" / "s", train=rows, test=rows[:1]), "regression")
    table = write_csv(tmp_path / "2" / "s", "label", train=["-1.5", "3"], test=["-1.50"])
    cells = load(table, "regression")
    for data in (plain, cells):
        assert data.classes == ("label",) and data.kind == "regression"
        assert data.train.labels.tolist() == [-1.5, 3] and data.train.labels.dtype == np.float32
    assert plain.fingerprint == cells.fingerprint


def test_the_fingerprint_follows_the_numbers_and_the_marks(tmp_path: Path) -> None:
    def mark(name: str, kind: str, value: Any) -> str:
        rows = [{"label": value}, {"label": 0.5 if kind == "regression" else ["a", "b"]}]
        return load(write(tmp_path / name, train=rows, test=rows), kind).fingerprint

    assert mark("1", "regression", 1.0) != mark("2", "regression", 1.25)
    assert mark("3", "multi", ["a"]) != mark("4", "multi", ["b"])


@pytest.mark.parametrize(
    ("kind", "cell", "allowed"),
    [
        ("regression", "good", "a finite number"),
        ("regression", None, "a finite number"),
        ("regression", "", "a finite number"),
        ("regression", "inf", "a finite number"),
        ("multi", 2, "0 or 1"),
        ("multi", "yes", "0 or 1"),
    ],
)
def test_the_first_label_that_is_none_is_named(
    kind: str, cell: Any, allowed: str, tmp_path: Path
) -> None:
    good, bad = {"a": "1", "b": "0"}, {"a": cell if cell is None else str(cell), "b": "1"}
    folder = write(tmp_path, train=[good, good], test=[good, bad, bad])
    columns: Any = "a" if kind == "regression" else ("b", "a")
    with pytest.raises(DataError, match="split 'test' has a label that can't be read") as caught:
        load(folder, kind, label_column=columns)
    assert caught.value.got == repr(bad["a"]) and caught.value.allowed == allowed
    assert caught.value.where == f"{folder / 'test.jsonl'}:2, column 'a'"


def test_a_missing_list_is_an_unlabelled_row(tmp_path: Path) -> None:
    folder = write(tmp_path, train=[{"label": ["a"]}, {"label": None}], test=[{"label": ["a"]}])
    with pytest.raises(DataError, match="split 'train' has a label that can't be read") as caught:
        load(folder, "multi")
    assert caught.value.got == "None" and "train.jsonl:2" in str(caught.value.where)


def test_names_without_a_separator_are_no_lists(tmp_path: Path) -> None:
    folder = write_csv(tmp_path, "label", train=["a b", "b"], test=["a"])
    with pytest.raises(DataError, match="has no lists of names") as caught:
        load(folder, "multi")
    assert "data.label_separator" in str(caught.value.hint)
    assert load(folder, "multi", separator=" ").train.labels.tolist() == [[1, 1], [0, 1]]


def test_a_name_that_training_never_sees_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, train=[{"label": ["a"]}], test=[{"label": ["a", "odd"]}])
    with pytest.raises(DataError, match="different classes") as caught:
        load(folder, "multi")
    assert caught.value.got == "only in the test split: odd"


def test_a_missing_column_of_several_is_named(tmp_path: Path) -> None:
    folder = write_csv(tmp_path, "a,b", train=["1,0"], test=["0,1"])
    with pytest.raises(DataError, match="column 'c' does not exist") as caught:
        load(folder, "multi", label_column=("a", "c"))
    assert caught.value.hint == "set data.label_columns"


def test_ratings_that_are_taken_for_classes_say_what_to_set(tmp_path: Path) -> None:
    rows = [{"label": 0.5}]
    with pytest.raises(DataError, match="not a class label") as caught:
        load(write(tmp_path, train=rows, test=rows), "single")
    assert "regression" in str(caught.value.hint)


def test_without_labels_no_column_is_needed_and_none_is_read(tmp_path: Path) -> None:
    bare = write(tmp_path / "1" / "s", train=[{}, {}], test=[{}])
    odd = write(tmp_path / "2" / "s", train=[{"label": 0.5}, {"label": 1}], test=[{"label": 2}])
    found = [load(bare, "none"), load(odd, "none")]
    for data in found:
        assert data.classes == () and data.kind == "none"
        assert data.train.labels.tolist() == [0, 0] and data.train.labels.dtype == np.int64
    assert found[0].fingerprint == found[1].fingerprint


def prose(folder: Path, train: str, test: str = "one\n") -> Path:
    folder.mkdir()
    (folder / "train.txt").write_text(train, encoding="utf-8-sig")
    (folder / "test.txt").write_text(test)
    return folder


def test_lines_and_paragraphs_of_plain_files(tmp_path: Path) -> None:
    folder = prose(tmp_path / "s", "\n\none line,\n  and more\n\n \nünïcode\n\n", "a\nb")
    lines, paragraphs = load(folder, "none"), load(folder, "none", unit="paragraph")
    assert list(lines.train.items) == ["one line,", "and more", "ünïcode"]
    assert list(paragraphs.train.items) == ["one line, and more", "ünïcode"]
    assert list(paragraphs.test.items) == ["a b"]
    assert len(lines.train) == 3 and lines.fingerprint != paragraphs.fingerprint


def test_plain_files_have_no_labels(tmp_path: Path) -> None:
    folder = prose(tmp_path / "s", "one\n")
    with pytest.raises(DataError, match="tables do not exist") as caught:
        load(folder, "single")
    assert caught.value.got == "test.txt, train.txt"
    assert "train.csv and test.csv with labels" in str(caught.value.allowed)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    folder = prose(tmp_path / "s", "one\n", " \n")
    with pytest.raises(DataError, match="split 'test' is empty"):
        load(folder, "none")


def test_labels_can_be_left_out_of_any_data_set(tmp_path: Path) -> None:
    rows = [{"label": "x"}, {"label": "y"}]
    data = load(write(tmp_path, train=rows, test=rows), "single")
    bare = unlabelled(data)
    assert (bare.kind, bare.classes, bare.name) == ("none", (), data.name)
    assert list(bare.test.items) == list(data.test.items)
    assert bare.test.labels.tolist() == [0, 0]
    assert bare.fingerprint != data.fingerprint
    assert unlabelled(bare) is bare
