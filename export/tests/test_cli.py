"""The verbs, their exit codes, and one clear message for each fault."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slimfuse_export import ExportError, __version__
from slimfuse_export.cli import main, proving
from slimfuse_export.cli._words import name_models


@pytest.fixture
def run(capsys):
    """Run main and return exit code, stdout and stderr."""

    def call(*words):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        return caught.value.code, *capsys.readouterr()

    return call


def test_check_says_what_held_and_what_failed(run, finished):
    code, out, err = run("check", finished)
    assert (code, err) == (0, "")
    assert out.count("ok ") == 14
    (finished / "config.json").unlink()
    code, out, err = run("check", finished)
    assert code == 3
    assert "FAILED config.json" in out
    assert "1 of 14 checks failed" in err
    code, out, err = run("check", finished / "none")
    assert (code, out) == (2, "")
    assert err.startswith("there is no such folder\n  where:")


def test_quantize_writes_the_int8_model(run, finished):
    target = finished / "onnx" / "model_quantized.onnx"
    target.unlink()
    code, out, _ = run("quantize", finished, "--min-seconds", "0")
    assert code == 0
    assert "2 products in dynamic INT8" in out or "2 products in static INT8" in out
    assert run("check", finished)[0] == 0
    (finished / "onnx" / "model.onnx").write_bytes(b"garbage")
    code, _, err = run("quantize", finished)
    assert code == 2
    assert "Traceback" not in err


def test_bench_times_folders_and_files(run, finished, write, tmp_path):
    report = tmp_path / "bench.json"
    quick = ("--min-seconds", "0", "--warmup", "1", "--json", report)
    code, out, err = run("bench", finished, write("[b].onnx"), "--batch", "1,3", *quick)
    assert code == 0
    assert "as fast as model" in out
    assert "[b]" in out
    assert "1 thread, batch 3" in err
    written = json.loads(report.read_text())
    names = {row["name"] for row in written["latencies"]}
    assert names == {"model", "model/int8", "[b]"}
    assert len(written["latencies"]) == 6
    assert len(written["ratios"]) == 4
    assert str(tmp_path) not in report.read_text()


def test_doctor_describes_the_machine(run):
    code, out, _ = run("doctor")
    assert code == 0
    for word in ("onnxruntime", "expected to be fast", "8-bit products"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bench", "none.onnx"), "the model does not exist"),
        (("bench", "none.onnx", "--threads", "two"), "not a list of whole numbers"),
        (("bench", "none.onnx", "--threads", "0"), "threads"),
        (("bench", "none.onnx", "--dim", "length"), "not a dim's size"),
        (("bench", "none.onnx", "--json", "none/x.json"), "folder to write into"),
        (("bench", "."), "the folder holds no model"),
        (("chekc",), "No such command"),
        (("check",), "Missing argument"),
    ],
)
def test_bad_input_exits_2_with_one_message(run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_an_internal_fault_is_one_line_unless_debugged(run, monkeypatch):
    def broken():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(proving, "environment", broken)
    code, _, err = run("doctor")
    assert code == 1
    line = "internal fault: RuntimeError: two lines; run with --debug for the traceback\n"
    assert err == line
    for words in (["--debug", "doctor"], ["doctor", "--debug"]):
        with pytest.raises(RuntimeError, match="two"):
            main(words)


def test_it_runs_as_a_module():
    words = [sys.executable, "-m", "slimfuse_export", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
    assert done.stderr == ""


def test_models_are_named_by_as_little_as_tells_them_apart():
    a, b = (Path(f"/runs/{run}/model/onnx/model.onnx") for run in "ab")
    int8 = a.with_name("model_quantized.onnx")
    assert list(name_models([a, int8])) == ["model", "model/int8"]
    assert list(name_models([a, int8, b])) == ["a/model", "a/model/int8", "b/model"]
    assert name_models([Path("x.onnx"), Path("y.onnx")]) == {
        "x": Path("x.onnx"),
        "y": Path("y.onnx"),
    }
    with pytest.raises(ExportError, match="given twice"):
        name_models([a, Path("/runs/b/../a/model/onnx/model.onnx")])
