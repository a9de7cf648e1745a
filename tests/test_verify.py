"""The proof in a clean process: it holds for a finished folder, and fails where it must."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from slimfuse import stock
from slimfuse.errors import CheckFailed, UserError
from slimfuse.pipeline import Run
from slimfuse.stock import one_process, verify
from slimfuse.stock.process import clean_process
from slimfuse.stock.scripts import COMPARE


@pytest.fixture
def model(finished: Run, tmp_path: Path) -> Path:
    """A copy of the finished model that a test may spoil."""
    return Path(shutil.copytree(finished.model, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_finished_folder_holds_in_a_process_that_cannot_import_slimfuse(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what lies in the current folder is not imported in place of what is installed
    (tmp_path / "torch.py").write_text("raise RuntimeError('the wrong torch')")
    monkeypatch.chdir(tmp_path)
    with one_process():  # that starts here
        found = verify(finished.model)
    assert found.model_class == "ViTForImageClassification"
    assert found.parameters == finished.report.rows[-2].params
    assert found.gap < 1e-5


def test_the_script_cannot_import_slimfuse(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    script = stock.SCRIPTS["stock"]
    spoiled = script.replace("import numpy", "import slimfuse.store; import numpy")
    assert spoiled != script
    monkeypatch.setitem(stock.SCRIPTS, "stock", spoiled)
    with pytest.raises(CheckFailed, match="can't open the folder") as error:
        verify(finished.model)
    assert "slimfuse" in str(error.value.got)


SPOILED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "perturbed": (
        lambda f: change(f, lambda w: w["classifier.bias"].add_(1e-3)),
        "other answers", "relative",
    ),
    "not a number": (
        lambda f: change(f, lambda w: w["classifier.bias"].fill_(float("nan"))),
        "other answers", "nan",
    ),
    "missing": (
        lambda f: change(f, lambda w: w.pop("classifier.bias")),
        "don't fit", "missing_keys: classifier.bias",
    ),
    "unexpected": (
        lambda f: change(f, lambda w: w.update(extra=w["classifier.bias"].clone())),
        "don't fit", "unexpected_keys: extra",
    ),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99),
        "can't open the folder", "",
    ),
    "no samples": (
        lambda f: np.savez(f / "onnx" / "samples.npz", other=np.zeros(1)),
        "no answers of its run", "None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_fails(model: Path, case: str) -> None:
    assert verify(model).gap < 1e-5
    spoil, what, got = SPOILED[case]
    spoil(model)
    with pytest.raises(CheckFailed, match=what) as error:
        verify(model)
    assert got in str(error.value.got)
    assert str(model) in str(error.value.where)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "onnx/samples.npz"])
def test_a_folder_without_a_file_is_told(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(UserError, match="not a finished model folder") as error:
        verify(model)
    assert f"no {name}" in str(error.value.got)


def test_folders_share_a_process_that_is_made_anew_where_it_died(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_process():
        first = verify(model)
        with clean_process() as process:
            assert process.alive
        assert verify(model) == first
        with clean_process() as again:
            assert again is process
        monkeypatch.setitem(stock.SCRIPTS, "stock", "import os\nos._exit(7)")
        with pytest.raises(CheckFailed, match="can't open the folder") as error:
            verify(model)
        assert error.value.got == "the process ended with 7"
        monkeypatch.undo()
        assert verify(model) == first
        with clean_process() as fresh:
            assert fresh is not process
    assert not fresh.alive


def test_a_script_leaves_nothing_to_the_next(model: Path) -> None:
    with one_process(), clean_process() as process:
        assert process.ask("left = 1; tell({'x': threads})", model, 3) == {"x": 3}
        assert process.ask("tell({'x': left})", model, 3) == {
            "error": "NameError: name 'left' is not defined"
        }


@pytest.mark.parametrize("place, gap", [((0, 2, 1), 0.0), ((0, 1, 1), 0.5)])
def test_padding_is_not_compared(tmp_path: Path, place: tuple[int, ...], gap: float) -> None:
    (tmp_path / "onnx").mkdir()
    mask, want = np.array([[1, 1, 0], [1, 1, 1]]), np.ones((2, 3, 4))
    cases = {"0/inputs/attention_mask": mask, "0/outputs/last_hidden_state": want}
    np.savez(tmp_path / "onnx" / "samples.npz", **cases)
    got, told = want.copy(), dict[str, Any]()
    got[place] += 0.5
    given: dict[str, Any] = {
        "folder": str(tmp_path), "np": np, "answer": lambda inputs: got, "problems": {},
        "output": "last_hidden_state", "name": "x", "processor": 0, "parameters": 1,
        "tell": told.update,
    }  # fmt: skip
    exec(COMPARE, given)
    assert told["gap"] == gap and told["samples"] == 2 and not told["problems"]
