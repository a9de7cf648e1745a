"""The verbs, their exit codes, and one clear message for each fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from slimfuse_export import ExportError, __version__
from slimfuse_export.cli import app as app_of_cli
from slimfuse_export.cli import main, proving
from slimfuse_export.cli._words import name_models
from slimfuse_export.errors import EXIT_CODES


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
    quick = ("--min-seconds", "0", "--warmup", "1", "--json")
    code, out, err = run("bench", finished, write("[b].onnx"), "--batch", "1,3", *quick)
    assert code == 0
    assert "as fast as model" in err
    assert "[b]" in err
    assert "1 thread, batch 3" in err
    written = json.loads(out)
    names = {row["name"] for row in written["latencies"]}
    assert names == {"model", "model/int8", "[b]"}
    assert len(written["latencies"]) == 6
    assert len(written["ratios"]) == 4
    assert str(tmp_path) not in out


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
        (("bench", "none.onnx", "--plot", "none/x.svg"), "folder to write into"),
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


def commands():
    app = typer.main.get_command(app_of_cli)
    return {name: one for name, one in app.commands.items() if name != "serve"}


@pytest.mark.parametrize("name", commands())
def test_every_verb_prints_json_where_asked(name):
    (flag,) = [one for one in commands()[name].params if "--json" in one.opts]
    assert flag.is_flag and flag.default is False


@pytest.mark.parametrize("words", [("check",), ("inspect",), ("doctor",), ("package",)])
def test_json_is_all_that_stands_on_stdout(run, finished, tmp_path, words):
    more = {"doctor": (), "package": (finished, "--format", "zip", "--out", tmp_path / "m.zip")}
    code, out, err = run(*words, *more.get(words[0], (finished,)), "--json")
    assert code == 0
    assert err and json.loads(out)
    code, plain, err = run(*words, *more.get(words[0], (finished,))[:1])
    assert not plain.startswith(("{", "["))


def test_json_of_a_failed_check_and_of_bad_input(run, finished):
    (finished / "config.json").unlink()
    code, out, err = run("check", finished, "--json")
    assert code == 3 and not json.loads(out)["passed"]
    assert "1 of 14 checks failed" in err
    code, out, err = run("check", finished / "none", "--json")
    assert (code, out) == (2, "") and err.startswith("there is no such folder")


def test_help_states_the_exit_codes(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out = run("--help")[1]
    for code, told in EXIT_CODES.items():
        assert f"{code.value} {told}" in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_verbs(shell):
    env = {
        **os.environ, "_SLIMFUSE_EXPORT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "slimfuse-export ins", "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "slimfuse-export ins", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    words = [sys.executable, "-m", "slimfuse_export"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=True)
    assert "inspect" in done.stdout and "quantize" not in done.stdout
