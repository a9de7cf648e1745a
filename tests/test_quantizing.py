"""The quantised file: mended with float products, dropped, or of another kind; other graphs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from slimfuse_export import read_metadata
from slimfuse_export.optimization import choosing
from tiny_run import undrawn

from slimfuse.pipeline import Run, compress, quantizing
from slimfuse.report import from_json, to_json


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "tiny", symlinks=True))


def row(run: Run):
    return next(row for row in run.report.rows if row.name == "onnx-int8")


@pytest.mark.parametrize("holds", [True, False])
def test_noisy_products_stay_float_where_that_helps(
    copied: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    undrawn(monkeypatch)
    losses = iter([0.5, 0.2, 0.0] if holds else [0.5] * 99)
    monkeypatch.setattr(quantizing, "quantisation_loss", lambda *_: next(losses))
    run = compress(tiny_recipe, overrides=("export.quantize.mode=auto",), out=copied)
    tried = [one for one in run.report.tried if one.file.endswith("quantized.onnx")]
    file = run.model / "onnx" / "model_quantized.onnx"
    assert file.exists() == holds == row(run).note.startswith("shipped")
    assert tried[0].name == "dynamic INT8"
    assert tried[0].outcome == "lost"
    assert from_json(to_json(run.report)) == run.report
    if not holds:
        assert {one.outcome for one in tried} == {"lost"}
        return
    assert [one.outcome for one in tried] == ["lost", "lost", "kept"]
    assert "products float32" in tried[-1].name
    assert read_metadata(file).history[-1].endswith("float")


@pytest.mark.parametrize(("mode", "step"), [("static", "static INT8"), ("int4", "int4")])
def test_other_kinds_are_made_as_asked(
    copied: Path, tiny_recipe: Path, mode: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    overrides = (f"export.quantize.mode={mode}", "export.quantize.max_drop=1.0")
    run = compress(tiny_recipe, overrides=overrides, out=copied)
    said = read_metadata(run.model / "onnx" / "model_quantized.onnx")
    assert said.history == ("export", step)
    assert f"mode {mode} was asked for" in run.report.tried[0].reason


def test_other_graphs_are_tried_where_asked(
    copied: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_confirmed", lambda *_: "opset 21")  # as if it won
    run = compress(tiny_recipe, overrides=("export.optimize=true",), out=copied)
    names = {one.name for one in run.report.tried if one.file == "onnx/model.onnx"}
    assert {"onnxruntime all", "opset 21", "float16"} <= names
    said = read_metadata(run.model / "onnx" / "model.onnx")
    assert said.history == ("export", "optimize: opset 21")
    assert said.provenance is not None
    assert "ONNX files that were tried" in (run.folder / "report.html").read_text()
