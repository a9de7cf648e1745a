"""Whole runs: zeros in every file where the masks say, what the report tells, the verb."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console
from tiny_run import TRAIN, recipe, save_parent, undrawn, unproved, write_recipe
from transformers import AutoModelForImageClassification

from slimfuse import cli
from slimfuse.pipeline import Run, compress
from slimfuse.pipeline.sparse_report import STATEMENT, compressed_bytes, short_names
from slimfuse.report import console_table, from_json, verdict
from slimfuse.saliency.masks import FILE, Masks

SPARSITY = 0.75


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained parent, fused to half its width, pruned and recovered; tests only look at it."""
    home = tmp_path_factory.mktemp("sparse")
    made = recipe(
        parents=[{"name": "a", "train": TRAIN}], baselines=[], finetune={"epochs": 1},
        fuse={"units": "magnitude"},
        # queries and keys left out, so that no two layers are all zeros and share one initializer
        sparsify={"sparsity": SPARSITY, "samples": 40, "epochs": 2,
                  "leave_out": ["*.q_proj.*", "*.k_proj.*"]},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        unproved(patch)
        return compress(write_recipe(home / "tiny.yaml", made), out=home / "run")


@pytest.fixture(scope="module")
def masks(run: Run) -> Masks:
    (folder,) = (run.folder / "stages").glob("sparse-[0-9a-f]*")
    return Masks.load(folder / FILE)


def initializers(run: Run, name: str) -> dict[str, Any]:
    graph = onnx.load(run.model / "onnx" / name).graph
    return {one.name: numpy_helper.to_array(one) for one in graph.initializer}


def test_the_stock_model_has_zeros_where_the_masks_say(run: Run, masks: Masks) -> None:
    model = AutoModelForImageClassification.from_pretrained(run.model)
    for name, mask in masks.items():
        assert bool(((model.get_parameter(name) == 0) == ~mask).all()), name
    total = sum(m.numel() for m in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == round(SPARSITY * total)
    assert len({round(share, 3) for share in masks.sparsities().values()}) > 1  # found, not given


def test_onnx_files_have_zeros_where_the_masks_say(run: Run, masks: Masks) -> None:
    model = AutoModelForImageClassification.from_pretrained(run.model)
    plain, int8 = (initializers(run, f"model{kind}.onnx") for kind in ("", "_quantized"))
    seen = 0
    for name, mask in masks.items():
        weight, zeros = model.get_parameter(name).detach().numpy(), ~mask.numpy()
        ((found, turned),) = [
            (key, turn)
            for key, value in plain.items()
            for turn in (False, True)
            if value.shape == (weight.T if turn else weight).shape
            and np.array_equal(value, weight.T if turn else weight)
        ][:1]
        zeros = zeros.T if turned else zeros
        assert np.array_equal(plain[found] == 0, zeros), name
        if f"{found}_Transposed_quantized" in int8:  # Gemm becomes a product, too
            found, zeros = f"{found}_Transposed", zeros.T
        if f"{found}_quantized" not in int8:  # a convolution stays in float32
            assert np.array_equal(int8[found] == 0, zeros), name
            continue
        seen += 1
        codes, point = int8[f"{found}_quantized"], int8[f"{found}_zero_point"]
        assert codes.dtype == np.int8 and not point.any()
        assert not codes[zeros].any(), name
        assert codes[~zeros].any()
    assert seen == len(masks) - 1


def test_rows_and_notes(run: Run) -> None:
    rows = {row.name: row for row in run.report.rows}
    assert list(rows) == [
        "a", "fused", "finetuned", "sparse", "sparse-magnitude", "onnx", "onnx-int8",
        "random-refit",
    ]  # fmt: skip
    assert [rows[n].stage for n in ("sparse", "sparse-magnitude")] == ["sparse", "baseline"]
    assert rows["sparse"].note.startswith("75.0% zeros by woodfisher, 40 gradients, 10 steps of")
    assert "before recovery" in rows["sparse"].note
    assert "control" in rows["sparse-magnitude"].note and "gradients" not in rows[
        "sparse-magnitude"
    ].note  # fmt: skip
    # what is exported is the sparse child
    for key, figure in rows["sparse"].metrics.items():
        assert rows["onnx"].metrics[key].value == pytest.approx(figure.value, abs=1e-9)
    assert rows["onnx"].parity_max_abs is not None and rows["onnx"].parity_max_abs < 1e-4
    # the dense one's file is timed beside it
    assert rows["finetuned"].latency and rows["finetuned"].parity_max_abs is not None
    pairs = {(s.base, s.other) for s in run.report.speedups}
    assert ("finetuned", "onnx") in pairs and ("a", "onnx") in pairs


def test_the_report_tells_the_zeros(run: Run, masks: Masks) -> None:
    report = from_json((run.folder / "report.json").read_text())
    assert report == run.report
    assert {z.name: z.zeros for z in report.zeros} == {n: int((~m).sum()) for n, m in masks.items()}
    assert all(z.increase is not None and z.increase >= 0 for z in report.zeros)
    assert report.sparsity == pytest.approx(SPARSITY, abs=1e-3)
    assert STATEMENT in report.warnings
    sizes = {(s.model, s.file): s for s in report.sizes}
    assert len(sizes) == 4
    for file in ("model.onnx", "model_quantized.onnx"):
        stage = {"model.onnx": "onnx-child", "model_quantized.onnx": "int8"}[file]
        (made,) = (run.folder / "stages").glob(f"{stage}-{'?' * 16}/{file}")
        assert sizes["sparse", file].bytes == made.stat().st_size  # as the dense one: unstamped
        assert sizes["sparse", file].compressed < sizes["dense", file].compressed
    html = (run.folder / "report.html").read_text()
    assert "Zeros, layer by layer" in html and "vit.layers.0.attention.v_proj.weight" in html
    assert "onnxruntime computes zeros like any other number" in html
    titles = {p.title: p for p in report.pictures}
    assert len(titles["Zeros by layer"].data["values"]) == len(masks)
    assert "Loss while recovering" in titles
    assert "75 % zeros in the layers that were pruned" in verdict(report)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(console_table(report, width=120))
    assert "sparse-magnitude" in shown.get()
    card = (run.model / "README.md").read_text()
    assert "75.0% zeros by woodfisher" in card and STATEMENT in card


def test_compression_counts_bytes(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(3 << 20))
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(3 << 20))
    assert compressed_bytes(tmp_path / "zeros") < 4096
    assert compressed_bytes(tmp_path / "noise") >= 3 << 20


def test_names_lose_what_all_share() -> None:
    names = ["m.layers.0.fc1.weight", "m.layers.1.fc1.weight", "m.head.weight"]
    assert short_names(names) == ["0.fc1", "1.fc1", "head"]
    assert short_names(["a.weight"]) == ["a.weight"]
    assert short_names(["a.weight", "b.a.weight"]) == ["a", "b.a"]
    block = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    bert = [f"encoder.layer.{i}.{name}.weight" for i in range(2) for name in block]
    assert short_names([*bert, "pooler.dense.weight"])[4:] == [
        "1.attention.self.query", "1.attention.output", "1.intermediate", "1.output", "pooler",
    ]  # fmt: skip


# ---- the verb


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A recipe with a saved parent, whose target and gates are of a fusion."""
    made = recipe(
        parents=[{"name": "a", "from": str(save_parent(tmp_path / "stock"))}],
        finetune={"epochs": 1}, export={"quantize": {"mode": "none"}},
        gates=[{"metric": "params", "max_ratio": 0.5}, {"metric": "accuracy", "max_drop": 0.9}],
    )  # fmt: skip
    return write_recipe(tmp_path / "tiny.yaml", made)


def said(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["slimfuse", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_verb_prunes_a_stock_folder_at_its_own_shape(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unproved(monkeypatch)
    undrawn(monkeypatch)
    out = tmp_path / "run"
    words = ["sparsify", str(stock), "--sparsity", "0.5", "--scorer", "diagonal-fisher",
             "--set", "sparsify.controls=[]", "--set", "sparsify.samples=9",
             "--out", str(out)]  # fmt: skip
    assert said(monkeypatch, *words) == 0
    told = capsys.readouterr()
    assert "left out: gates on params, which zeros don't change" in told.err
    assert "sparse" in told.out and "gate accuracy" in told.out
    report = json.loads((out / "report.json").read_text())
    assert report["name"] == "tiny-sparse"
    assert [r["name"] for r in report["rows"]] == ["a", "fused", "finetuned", "sparse", "onnx"]
    assert report["rows"][3]["note"].startswith("50.0% zeros by diagonal-fisher, 9 gradients, 5 s")
    model, parent = (
        AutoModelForImageClassification.from_pretrained(f)
        for f in (out / "model", stock.parent / "stock")
    )
    assert model.config.hidden_size == parent.config.hidden_size
    (folder,) = (out / "stages").glob("sparse-[0-9a-f]*")
    Masks.load(folder / FILE).check(model)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--parent", "b"], "--parent b: no such parent"),
        (["--sparsity", "1.5"], "sparsify.sparsity: out of range; got: 1.5"),
        (["--scorer", "woodfsher"], "did you mean 'woodfisher'?"),
        (["--pattern", "4:2"], "unknown pattern of zeros"),
        (["--pattern", "2:4"], "sparsify.leave_out"),
        (["--steps", "0"], "sparsify.steps: out of range"),
        (["--set", "sparsify.sample=3"], "did you mean 'samples'?"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_nothing(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], words: list[str], line: str,
) -> None:  # fmt: skip
    assert said(monkeypatch, "sparsify", str(stock), *words, "--out", str(tmp_path / "run")) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
