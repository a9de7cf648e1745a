"""The verbs that use a folder."""

import io
import json
import sys

import deployed_folders as folders
import pytest
from slimfuse_export.cli import main


@pytest.fixture
def run(capsys, monkeypatch):
    """Run main with lines on standard input; return exit code, rows of JSON and stderr."""

    def call(*words, lines=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return caught.value.code, [json.loads(line) for line in out.splitlines()], err

    return call


@pytest.fixture
def sorts(tmp_path):
    return folders.sorts(tmp_path / "sorts")


@pytest.fixture
def colours(tmp_path):
    return folders.colours(tmp_path / "colours")


def test_texts_become_lines(run, sorts):
    code, rows, err = run("predict", sorts, "the cat", "elm", "--top-k", 1)
    assert (code, err) == (0, "")
    assert [(row["input"], row["label"], len(row["scores"])) for row in rows] == [
        ("the cat", "animal", 1), ("elm", "plant", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("words", [("-",), ()])
def test_lines_of_standard_input_are_texts(run, sorts, words):
    lines = "cat\r\noak\n\nkätzchen".encode()
    code, rows, _ = run("predict", sorts, *words, "--batch", 2, lines=lines)
    assert code == 0
    assert [row["input"] for row in rows] == ["cat", "oak", "", "kätzchen"]


def test_a_bad_line_does_not_lose_the_others(run, sorts):
    code, rows, err = run("predict", sorts, "-", lines=b"cat\n\xff\xfe\noak\n")
    assert code == 3
    assert [row.get("label") for row in rows] == ["animal", None, "plant"]
    assert rows[1]["error"].startswith("the text is no valid Unicode")
    assert err.startswith("1 of 3 inputs failed")


def test_images_and_folders_of_them(run, colours, tmp_path):
    shelf = tmp_path / "shelf" / "deep"
    shelf.mkdir(parents=True)
    (shelf / "b.PNG").write_bytes(folders.picture("blue"))
    (shelf.parent / "g.jpg").write_bytes(folders.picture("green", kind="JPEG"))
    (shelf / "notes.txt").write_text("no image")
    bad = tmp_path / "bad.png"
    bad.write_bytes(folders.picture()[:30])
    code, rows, err = run("predict", colours, shelf.parent, bad, shelf / "none.png")
    assert code == 3
    assert [row.get("label") for row in rows] == ["blue", "green", None, None]
    assert [row["input"] for row in rows[:2]] == [str(shelf / "b.PNG"), str(shelf.parent / "g.jpg")]
    assert "2 of 4 inputs failed" in err
    code, rows, _ = run("predict", colours, "-", lines=str(shelf / "b.PNG").encode())
    assert (code, rows[0]["label"]) == (0, "blue")


def test_generated_texts_and_embeddings(run, tmp_path):
    causal = folders.states(tmp_path / "causal", "GPT2LMHeadModel")
    code, rows, _ = run("predict", causal, "the", "--max-new-tokens", 1)
    assert (code, rows) == (0, [{"input": "the", "text": "old", "tokens": 1, "finish": "length"}])
    features = folders.states(tmp_path / "features", "BertModel")
    code, rows, _ = run("predict", features, "the", "--pooling", "none")
    assert (code, len(rows[0]["features"])) == (0, 3)


def test_bad_usage_exits_2(run, sorts, colours, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, said in (
        ((tmp_path / "none", "cat"), "no such folder"),
        ((tmp_path / "empty", "cat"), "the model does not exist"),
        ((sorts, "cat", "--int8"), "the model does not exist"),
        ((sorts, "cat", "--pooling", "max"), "unknown pooling"),
        ((sorts, "cat", "--temperature", "-1"), "option is not legal"),
        ((sorts, "cat", "--batch", "0"), "--batch"),
        ((colours, tmp_path / "empty"), "the folder holds no images"),
    ):
        code, rows, err = run("predict", *words)
        assert (code, rows) == (2, [])
        assert said in err
        assert "Traceback" not in err


def test_at_a_terminal_inputs_must_be_given(capsys, monkeypatch, sorts):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(sorts)])
    assert caught.value.code == 2
    assert "nothing to predict" in capsys.readouterr().err
