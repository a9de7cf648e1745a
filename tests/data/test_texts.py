"""Texts from tables and through `datasets`, and what goes wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimfuse.data import load_texts
from slimfuse.errors import DataError

TRAIN = [("a dark,\nslow film", "bad"), ('"splendid"', "good"), ("NA", "odd"), ("0012", "bad")]
TEST = [("naïve but fun", "good"), ("null", "bad")]
NAMES = ("bad", "good", "odd")


def quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def write_csv(folder: Path, **splits: Sequence[tuple[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = ["score,text,label", *(f"3,{quoted(t)},{y}" for t, y in rows)]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_jsonl(folder: Path, **splits: Sequence[tuple[Any, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = (json.dumps({"text": t, "label": y}) + "\n" for t, y in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


WRITERS = [write_csv, write_jsonl]


def load(folder: Path, **changes: Any) -> Any:
    return load_texts(str(folder), **{"folder": True, **changes})


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_of_tables_gives_every_text_as_it_is_written(write: Any, tmp_path: Path) -> None:
    data = load(write(tmp_path / "films", train=TRAIN, test=TEST))
    assert (data.name, data.classes) == ("films", NAMES)
    for split, rows in ((data.train, TRAIN), (data.test, TEST)):
        found = [(split.items[i], NAMES[y]) for i, y in enumerate(split.labels)]
        assert found == rows
        assert split.labels.dtype == np.int64


def test_csv_and_json_lines_of_one_content_have_one_fingerprint(tmp_path: Path) -> None:
    csv = load(write_csv(tmp_path / "a" / "films", train=TRAIN, test=TEST))
    jsonl = load(write_jsonl(tmp_path / "b" / "films", train=TRAIN, test=TEST))
    assert csv.fingerprint == jsonl.fingerprint


@pytest.mark.parametrize(
    "train, test",
    [
        ([("x", "a"), ("y", "b")], [("z", "b")]),  # another label
        ([("x", "a"), ("yy", "b")], [("z", "a")]),  # another text
        ([("x", "a"), ("y", "c")], [("z", "a")]),  # another class of the same place
        ([("x", "a"), ("y", "b"), ("z", "a")], [("z", "a")]),  # one more
        ([("y", "b"), ("x", "a")], [("z", "a")]),  # another order
    ],
)
def test_the_fingerprint_follows_all_content(train: Any, test: Any, tmp_path: Path) -> None:
    first = load(write_csv(tmp_path / "1", train=[("x", "a"), ("y", "b")], test=[("z", "a")]))
    assert load(write_csv(tmp_path / "2", train=train, test=test)).fingerprint != first.fingerprint


@pytest.mark.parametrize("write", WRITERS)
def test_whole_numbers_are_classes_in_order_of_size(write: Any, tmp_path: Path) -> None:
    rows = [("a", 10), ("b", -1), ("c", 9), ("d", 10)]
    data = load(write(tmp_path / "set", train=rows, test=rows[:1]))
    assert data.classes == ("-1", "9", "10")
    assert data.train.labels.tolist() == [2, 0, 1, 2]


def test_other_splits_and_columns_are_read(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "set", fit=[("a", "x"), ("b", "y")], dev=[("c", "y")])
    for file in folder.iterdir():
        file.write_text(file.read_text().replace("text,label", "body,topic"))
    names = {"train_split": "fit", "test_split": "dev", "text_column": "body"}
    data = load(folder, label_column="topic", **names)
    assert list(data.test.items) == ["c"] and data.test.labels.tolist() == [1]


def test_columns_that_are_not_used_may_differ_between_the_splits(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "set", train=TRAIN, test=TEST)
    (folder / "test.csv").write_text("label,score,text,source\nbad,,dull,me\n")
    (folder / "train.csv").write_text("text,label\nfine,good\nweak,bad\n", encoding="utf-8-sig")
    data = load(folder)
    assert list(data.test.items) == ["dull"] and data.test.labels.tolist() == [0]


def test_one_split_may_serve_twice(tmp_path: Path) -> None:
    data = load(write_csv(tmp_path / "set", train=TRAIN), test_split="train")
    assert list(data.test.items) == list(data.train.items)


@pytest.mark.parametrize("text", ["", "  "])
def test_the_first_row_without_text_is_named(text: str, tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "set", train=TRAIN, test=[TEST[0], (text, "bad"), ("", "bad")])
    with pytest.raises(DataError, match="split 'test' has a row without text") as caught:
        load(folder)
    assert caught.value.got == repr(text)
    assert caught.value.where == f"{folder / 'test.csv'}:3, column 'text'"
    assert "data.text_column" in str(caught.value.hint)


def test_a_missing_text_is_a_row_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(write_jsonl(tmp_path / "set", train=[*TRAIN, (None, "bad")], test=TEST))
    assert caught.value.got == "None"
    assert str(caught.value.where).endswith("train.jsonl:5, column 'text'")


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "set", train=TRAIN, test=TEST)
    with pytest.raises(DataError, match="column 'text' is not text") as caught:
        load(write_jsonl(tmp_path / "other", train=[(3, "a")], test=[(4, "a")]))
    assert "int64" in str(caught.value.got)
    # a CSV's column is text if the recipe says so: "3" is a text, too
    assert list(load(folder, text_column="score").train.items) == ["3"] * len(TRAIN)


def test_a_class_that_training_never_sees_is_refused(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "set", train=TRAIN, test=[("a", "vile"), ("b", "grand")])
    with pytest.raises(DataError, match="different classes") as caught:
        load(folder)
    assert caught.value.got == "only in the test split: grand, vile"


@pytest.mark.parametrize(
    "write, nothing, place", [(write_csv, "", "csv:4"), (write_jsonl, None, "jsonl:2")]
)
def test_unlabelled_rows_are_refused(write: Any, nothing: Any, place: str, tmp_path: Path) -> None:
    """The lines of the file count: a text may take several of a CSV."""
    folder = write(tmp_path / "set", train=TRAIN, test=[("a\nb", "bad"), ("b", nothing)])
    with pytest.raises(DataError, match="split 'test' has rows without a label") as caught:
        load(folder)
    assert str(caught.value.where).endswith(f"test.{place}")
    assert caught.value.got == "1 of 2 rows, this one first"
    assert caught.value.allowed and caught.value.hint


def test_ratings_are_no_classes(tmp_path: Path) -> None:
    rows = [("a", 0.5), ("b", 1.5)]
    with pytest.raises(DataError, match="'label' is not a class label") as caught:
        load(write_jsonl(tmp_path / "set", train=rows, test=rows))
    assert "float64" in str(caught.value.got)


def test_a_wrong_column_names_the_columns_there_are(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "set", train=TRAIN, test=TEST)
    with pytest.raises(DataError, match="column 'body' does not exist") as caught:
        load(folder, text_column="body")
    assert caught.value.allowed == "score, text, label"
    assert caught.value.hint == "set data.text_column"


def test_a_missing_table_names_those_there_are(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "set", train=TRAIN, dev=TEST)
    with pytest.raises(DataError, match="tables do not exist") as caught:
        load(folder)
    assert caught.value.got == "dev.csv, train.csv"
    assert "train.csv and test.csv" in str(caught.value.allowed)
    assert "data.test_split" in str(caught.value.hint)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text folder does not exist") as caught:
        load(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


GOOD = b'text,label\n"a film,\nlong",bad\n'


@pytest.mark.parametrize(
    ("write", "content", "line", "words"),
    [
        (write_csv, b"", 1, ("the table is empty", "the columns' names")),
        (write_csv, b"\n\n", 1, ("the table is empty", "data.test_split")),
        (write_jsonl, b"\n", 1, ("the table is empty", "one object a line")),
        (write_csv, b"text,label\n", None, ("split 'test' is empty", "no row", "data.test_split")),
        (write_jsonl, b'{"text": "a", "label": "bad"}\n\n{no\n', 3, ("not a JSON object", "{no")),
        (write_jsonl, b'["a", "bad"]\n', 1, ("not a JSON object", '["a", "bad"]')),
        (write_csv, b"text,label\nb,bad\n\xe9,a\n", 3, ("not UTF-8", "0xe9", "iconv")),
        (write_csv, GOOD + b"short\n", 4, ("number of cells", "1: short", "2: text, label")),
        (write_csv, GOOD + b"\na,b,bad\n", 5, ("number of cells", "3: a, b, bad", "quotes")),
        (write_csv, GOOD + b'"open,bad\nx,y\n', 4, ("can't be read", "written twice")),
        (write_csv, b"text\tlabel\na\tbad\n", 1, ("between tabs", "'text\\tlabel'", "commas")),
        (write_csv, b"text,text,label\na,b,bad\n", 1, ("one name", "text")),
    ],
)  # fmt: skip
def test_a_table_that_is_none_says_where_and_why(
    write: Any, content: bytes, line: int | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write(tmp_path / "set", train=TRAIN, test=TEST)
    file = next(folder.glob("test.*"))
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(folder)
    assert caught.value.where == f"{file}" + (f":{line}" if line else "")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_tables_with_tabs_say_what_to_save(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "set", train=TRAIN, test=TEST)
    for file in folder.iterdir():
        file.rename(file.with_suffix(".tsv"))
    with pytest.raises(DataError, match="tables do not exist") as caught:
        load(folder)
    assert caught.value.got == "test.tsv, train.tsv" and ".csv" in str(caught.value.hint)


def test_a_long_text_and_cells_of_several_kinds_are_read(tmp_path: Path) -> None:
    """csv by itself takes 131 072 letters a cell; JSON's values need not be of one kind."""
    long = "word " * 30_000
    data = load(write_csv(tmp_path / "1", train=[(long, "a"), ("b", "b")], test=[("c", "a")]))
    assert data.train.items[0] == long
    rows: list[tuple[Any, Any]] = [("a", 1), ("b", "one"), ("c", 1)]
    mixed = load(write_jsonl(tmp_path / "2", train=rows, test=rows[:2]))
    assert mixed.classes == ("1", "one") and mixed.train.labels.tolist() == [0, 1, 0]


def saved(folder: Path, test_labels: Sequence[int | None]) -> Path:
    """Write texts with typed class labels as parquet."""
    import datasets

    folder.mkdir()
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(sentence=datasets.Value("large_string"), label=label)
    for split, labels in (("train", [1, 0, 1]), ("test", test_labels)):
        rows = {"sentence": [f"{split} {i}" for i in range(len(labels))], "label": list(labels)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_class_labels_keep_their_names_and_order(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", [1, 1])
    data = load_texts(str(folder), text_column="sentence")
    assert data.name == "set" and data.classes == ("neg", "pos")
    assert data.train.labels.tolist() == [1, 0, 1] and data.test.labels.tolist() == [1, 1]
    assert list(data.train.items) == ["train 0", "train 1", "train 2"]


@pytest.mark.parametrize("label", [-1, None])
def test_a_class_label_of_no_class_is_unlabelled(label: int | None, tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", [1, label])
    with pytest.raises(DataError, match="split 'test' has rows without a label") as caught:
        load_texts(str(folder), text_column="sentence")
    assert str(caught.value.where).endswith("split 'test', row 2")


def test_a_wrong_split_names_the_splits_there_are(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", [1])
    with pytest.raises(DataError, match="split 'dev' does not exist") as caught:
        load_texts(str(folder), text_column="sentence", test_split="dev")
    assert caught.value.allowed is not None and "test" in str(caught.value.allowed)
