"""Whole runs of plain nets: what they leave, and what a second run repeats."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets.tiny_nets import ROOT, SHIPPED, Build, save_net
from safetensors.torch import load_file, save_file
from tiny_run import events, folder_bytes
from typer.testing import CliRunner

from slimfuse.cli import app
from slimfuse.data import load_digits
from slimfuse.errors import CheckFailed
from slimfuse.nets import (
    ResNetConfig,
    load,
    load_config,
)
from slimfuse.pipeline import Run, compress
from slimfuse.pipeline.fusion_record import load_fusion
from slimfuse.pipeline.nets_job import prepare_nets
from slimfuse.pipeline.nets_stages import NetStages
from slimfuse.recipe import NetRecipe, load_recipe
from slimfuse.report import from_json
from slimfuse.stock import verify
from slimfuse.store import Store

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(net_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The finished run, which was stopped once on its way; tests only look at it."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("runs") / "nets"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("slimfuse.pipeline.nets_stages.fuse_nets", stop)
        compress(net_recipe, out=out)
    assert "fused" not in events(out, "done")
    return compress(net_recipe, out=out)


def test_a_run_leaves_a_model_and_a_report(run: Run) -> None:
    assert set(folder_bytes(run.model)) == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
        "onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/samples.npz",
    }  # fmt: skip
    report = from_json((run.folder / "report.json").read_text())
    assert {row.name: row.stage for row in report.rows} == {
        "a": "parent", "b": "parent", "slim": "parent", "fused": "fused", "finetuned": "finetuned",
        "onnx": "onnx", "onnx-int8": "onnx-int8", "vanilla": "baseline", "unfused": "baseline",
        "random-start": "baseline",
    }  # fmt: skip
    rows = {row.name: row for row in report.rows}
    assert "% before it; same finetuning budget" in rows["vanilla"].note
    assert rows["onnx"].parity_max_abs is not None and rows["onnx"].parity_max_abs < 1e-4
    assert rows["slim"].params < rows["a"].params == rows["onnx"].params
    assert report.summary == "2 of 3 parents on digits, fused into one model MLP 12-7"
    maps = next(p for p in report.pictures if p.group == "transport")
    assert maps.data["labels"] == ["layers 0", "layers 2"]
    assert "67%, 33%" in maps.caption
    assert (run.folder / "report.html").stat().st_size > 10_000
    assert report.settings["resolved"]["target"] == {"architecture": "mlp", "widths": [12, 7]}
    assert "torch-pruning" in report.settings["versions"]


def test_the_model_opens_without_slimfuse(run: Run) -> None:
    found = verify(run.model)
    assert found.model_class == "the ONNX file of mlp" and found.gap < 1e-5
    assert found.parameters == 193 * 12 + 13 * 7 + 8 * 10
    assert isinstance(load(run.model), torch.nn.Module)
    config = load_config(run.model)
    assert config.labels == tuple(load_digits().classes)
    card = (run.model / "README.md").read_text()
    assert "library_name: onnx" in card and "One MLP 12-7, fused by slimfuse" in card
    assert "from onnxruntime import InferenceSession" in card


def test_other_logits_are_seen(run: Run, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(run.model, tmp_path / "model"))
    with np.load(spoiled / "onnx" / "samples.npz") as file:
        saved = dict(file)
    moved = {k: v + (1e-2 if k.endswith("logits") else 0) for k, v in saved.items()}
    np.savez(spoiled / "onnx" / "samples.npz", **moved)
    with pytest.raises(CheckFailed, match="onnxruntime gives other answers"):
        verify(spoiled)


def test_a_run_that_stopped_goes_on(run: Run) -> None:
    for stage in ("parent-a", "parent-slim", "outputs-a", "fused", "finetuned"):
        assert events(run.folder, "done").count(stage) == 1
    assert events(run.folder, "start").count("fused") == 2


def test_a_second_run_repeats_nothing(run: Run, net_recipe: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run.folder, tmp_path / "run"))
    (again / "log.jsonl").unlink()
    compress(net_recipe, out=again)
    assert events(again, "start") == []
    assert folder_bytes(again / "model") == folder_bytes(run.model)


def test_only_what_a_change_concerns_is_made_again(
    run: Run, net_recipe: Path, tmp_path: Path
) -> None:
    again = Path(shutil.copytree(run.folder, tmp_path / "run"))
    (again / "log.jsonl").unlink()
    stages = starts(net_recipe, again, "fuse.ot.cost=weights", "fuse.ot.solver=sinkhorn")
    for kind in ("fused", "vanilla", "unfused", "random-start"):
        stages.start(kind)
    assert events(again, "start") == ["fused"]
    recalibrated = starts(net_recipe, again, "fuse.batch_size=16")
    for kind in ("vanilla", "unfused"):
        recalibrated.start(kind)
    assert events(again, "start") == ["fused", "vanilla"]


def starts(path: Path, root: Path, *overrides: str) -> NetStages:
    loaded = load_recipe(path, overrides)
    assert isinstance(loaded, NetRecipe)
    return NetStages(prepare_nets(loaded, path), Store(root))


def test_a_dense_net_is_moved_into_the_pruned_one(recipe: Build, tmp_path: Path) -> None:
    path = recipe(
        fuse={"parents": ["a", "slim"], "anchor": {"parent": "slim"}}, baselines=["unfused"]
    )
    stages = starts(path, tmp_path / "run")
    assert stages.job.base.name == "slim" and [p.name for p in stages.job.moved] == ["a"]
    fused = stages.start("fused")
    assert load_config(fused.path).widths == load_config(stages.parent(stages.job.base)[0]).widths
    record = load_fusion(fused.path)
    assert record["parents"] == ["slim", "a"]
    assert record["weights"] == pytest.approx([1 / 3, 2 / 3])  # shares of 1 and 2
    kept = load_file(stages.start("unfused").path / "model.safetensors")
    slim = load_file(stages.parent(stages.job.base)[0] / "model.safetensors")
    assert all(torch.equal(kept[k], slim[k]) for k in slim)


def test_saved_nets_and_an_anchor_that_is_no_parent(recipe: Build, tmp_path: Path) -> None:
    wide = save_net(tmp_path / "wide", ResNetConfig(3, (6, 8), (1, 1)))
    slim = save_net(tmp_path / "slim", ResNetConfig(3, (4, 5), (1, 1)), seed=1)
    path = recipe(
        parents=[{"name": "wide", "from": "wide"}],
        fuse={"anchor": {"from": "slim", "weight": 0.0}},
        finetune={}, baselines=["unfused"],
    )  # fmt: skip
    stages = starts(path, tmp_path / "run")
    assert stages.job.anchor is not None and stages.job.moves
    assert load_fusion(stages.start("fused").path)["weights"] == [0.0, 1.0]
    assert stages.job.parents[0].folder == wide
    # another file under the same name is another parent
    key = stages.start("fused").key
    state = load_file(slim / "model.safetensors")
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in state.items()},
              slim / "model.safetensors")  # fmt: skip
    assert starts(path, tmp_path / "run").start("fused").key != key


def test_a_pruned_parent_may_be_trained(recipe: Build, tmp_path: Path) -> None:
    stages = starts(recipe(), tmp_path / "one")
    trained = starts(
        recipe(parents__2__pruned__train={"epochs": 2, "batch_size": 32}), tmp_path / "two"
    )
    losses = []
    for one in (stages, trained):
        model = one.job.family.load(one.parent(one.job.parents[2])[0])
        samples = one.samples("train")
        scores = one.ask(model, "train", "x")["logits"]
        losses.append(float(torch.nn.functional.cross_entropy(scores, samples.labels)))
    assert losses[1] < losses[0]


def test_the_commands_take_both_families(net_recipe: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["recipe", "show", str(net_recipe)])
    assert shown.exit_code == 0 and "unfused" in shown.output
    planned = runner.invoke(app, ["plan", str(net_recipe)])
    assert planned.exit_code == 0 and "MLP" in planned.output and "12-7" in planned.output
    listed = runner.invoke(app, ["recipe", "list", str(ROOT / "recipes" / "auto")])
    assert listed.exit_code == 0 and listed.output.startswith("auto ")
    assert listed.output.count(".yaml ") >= len(SHIPPED)
