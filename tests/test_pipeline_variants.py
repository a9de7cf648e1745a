"""Recipes other than the tiny one: saved parents, other streams, no training, no INT8."""

from __future__ import annotations

import getpass
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import (
    events,
    folder_bytes,
    parents_unexported,
    recipe,
    save_parent,
    undrawn,
    unproved,
    write_recipe,
)

from slimfuse.data import load_digits
from slimfuse.errors import DataError, ParentError, ShapeError
from slimfuse.fuse.baselines import subclone
from slimfuse.pipeline import compress, images, plan
from slimfuse.pipeline import job as job_module
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store

OWN = ("digits", "fashion-mnist")  # what they need comes with them, or is here
SHIPPED = sorted(
    path
    for path in (Path(__file__).parents[1] / "recipes").rglob("*.yaml")
    if path.parent.name in ("auto", "ablations") or path.stem in OWN
)
PARENTS = [{"name": "wide", "from": "wide"}, {"name": "slim", "from": "slim", "weight": 0.5}]
TARGET = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    unproved(monkeypatch)
    undrawn(monkeypatch)
    parents_unexported(monkeypatch)


def start(saved_parents: Path, root: Path, **changes: Any) -> Stages:
    """Return the stages of a recipe with saved parents, nothing made yet."""
    content = recipe(**{"parents": PARENTS, "target": TARGET, **changes})
    path = write_recipe(saved_parents / f"{root.name}.yaml", content)
    root.mkdir(exist_ok=True)
    return Stages(prepare(load_recipe(path), path), Store(root))


def test_parents_of_different_widths_with_everything_switched(
    saved_parents: Path, tmp_path: Path
) -> None:
    path = write_recipe(
        saved_parents / "mixed.yaml",
        recipe(
            parents=PARENTS,
            target=TARGET,
            fuse={"stream": "ot"},
            finetune={"augment": ["flip"], "ema": 0.5, "distill": {"teachers": ["slim"]}},
            baselines=["random", "subclone"],
            export={"quantize": {"mode": "none"}},
            bench={"threads": [1, 2], "batch": [1, 3]},
        ),
    )
    run = compress(path, out=tmp_path / "run")
    rows = {row.name: row for row in run.report.rows}
    assert list(rows) == [
        "wide", "slim", "fused", "finetuned", "onnx", "random-refit", "random-start", "subclone",
    ]  # fmt: skip
    assert {(x.threads, x.batch) for x in rows["onnx"].latency} == {(1, 1), (1, 3), (2, 1), (2, 3)}
    assert "onnx/model_quantized.onnx" not in folder_bytes(run.model)
    config = json.loads((run.model / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"]) == (12, 2)
    assert config["pooler_output_size"] == 12
    card = (run.model / "README.md").read_text()
    assert "10 steps with slim as teacher.\n" in card
    secrets = (str(saved_parents), str(tmp_path), f"/{getpass.getuser()}/")
    for file in (*run.model.rglob("*"), run.folder / "recipe.lock.yaml"):
        if file.is_file():
            assert not [s for s in secrets if s.encode() in file.read_bytes()], file.name
    lock = (run.folder / "recipe.lock.yaml").read_text()
    assert lock.count("from: wide") == 1 and "sha256" in lock


def test_one_parent_without_training(saved_parents: Path, tmp_path: Path) -> None:
    path = write_recipe(
        saved_parents / "one.yaml",
        recipe(
            parents=[{"name": "child", "from": str(saved_parents / "slim")}],
            finetune={"epochs": 0},
            baselines=[],
            export={"quantize": {"mode": "dynamic"}},
            gates=[{"metric": "params", "max_ratio": 0.5}],
        ),
    )
    run = compress(path, out=tmp_path / "run")
    assert run.passed
    assert [row.name for row in run.report.rows] == [
        "child", "fused", "finetuned", "onnx", "onnx-int8", "random-refit",
    ]  # fmt: skip
    assert run.report.rows[0].params > 2 * run.report.rows[1].params
    fused, tuned = (
        load_file(next(run.folder.glob(f"stages/{s}-*")) / "model.safetensors")
        for s in ("fused", "finetuned")
    )
    assert all(torch.equal(fused[key], tuned[key]) for key in fused)
    assert "onnx/model_quantized.onnx" in folder_bytes(run.model)  # dynamic: always
    assert "not finetuned" in (run.model / "README.md").read_text()
    lock = (run.folder / "recipe.lock.yaml").read_text()
    assert str(saved_parents) not in lock and "slim" in lock  # an absolute path stays here


@pytest.mark.parametrize("stream", ["pca", "select", "ot", "cluster"])
def test_every_stream_gives_a_whole_model(saved_parents: Path, tmp_path: Path, stream: str) -> None:
    stages = start(saved_parents, tmp_path / stream, fuse={"stream": stream})
    scores = stages.evidence(stages.start("fused"))["logits"]
    assert scores.shape == (60, 10) and bool(torch.isfinite(scores).all())
    assert not bool((scores == scores[0]).all())  # it looks at the images


def test_a_target_between_the_parents_widths(saved_parents: Path, tmp_path: Path) -> None:
    between = {**TARGET, "hidden_size": 20}
    stages = start(saved_parents, tmp_path / "run", target=between)
    assert bool(torch.isfinite(stages.evidence(stages.start("fused"))["logits"]).all())
    reverse = start(saved_parents, tmp_path / "run", target=between, parents=PARENTS[::-1])
    assert [p.name for p in reverse.job.by_width] == ["wide", "slim"]
    with pytest.raises(ShapeError, match="larger than the parents'") as error:
        start(saved_parents, tmp_path / "run", target=between, parents=PARENTS[1:])
    assert error.value.where == "target.hidden_size"


@pytest.mark.parametrize("order", [1, -1])
def test_subclone_copies_the_widest_parent(saved_parents: Path, tmp_path: Path, order: int) -> None:
    stages = start(saved_parents, tmp_path / "run", parents=PARENTS[::order])
    family, job = stages.job.family, stages.job
    wanted = family.build(job.target)
    subclone(family.load(saved_parents / "wide"), wanted, family)
    found = family.load(stages.start("subclone").path).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in wanted.state_dict().items())


def test_a_plan_follows_the_batch_size_and_the_tokens(tiny_recipe: Path) -> None:
    def memory(*overrides: str) -> int:
        return plan(tiny_recipe, overrides=overrides).memory

    small = memory()
    large = memory("finetune.batch_size=4194304")
    assert large > 2 * small
    assert memory("parents.0.train.batch_size=4194304") > large  # wider than the child
    patches = [f"parents.{i}.train.config.patch_size=1" for i in (0, 1)]
    # 65 tokens for 5, and every pair of them has its score
    grown = (memory("finetune.batch_size=4194304", *patches) - small) / (large - small)
    assert grown > 65 / 5 * 1.3


@pytest.mark.parametrize(("quota", "wanted"), [(None, 4), (0.5, 1), (2.7, 2), (64.0, 4)])
def test_cores_are_those_allowed_within_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, wanted: int
) -> None:
    monkeypatch.setattr(job_module, "cores_allowed", lambda: 4)
    monkeypatch.setattr(job_module, "cpu_quota", lambda: quota)
    assert job_module.cores() == wanted


def test_a_parent_is_known_by_its_config_too(tmp_path: Path) -> None:
    save_parent(tmp_path / "wide", hidden_size=24, num_attention_heads=4, intermediate_size=32)
    save_parent(tmp_path / "slim")
    keys = []
    for epsilon in (1e-12, 1e-3):
        for name in ("wide", "slim"):
            file = tmp_path / name / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "layer_norm_eps": epsilon}))
        keys.append(start(tmp_path, tmp_path / "run").start("fused").key)
    assert keys[0] != keys[1]
    assert events(tmp_path / "run", "start") == ["fused", "fused"]


def test_limits_draw_from_every_class(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_digits()
    by_class = digits.test.take(np.argsort(digits.test.labels, kind="stable"))
    monkeypatch.setattr(images, "load_digits", lambda: replace(digits, test=by_class))
    limited = prepare(load_recipe(tiny_recipe, ("data.limit.test=60",)), tiny_recipe)
    assert len(limited.data.test) == 60 and len(set(limited.data.test.labels)) == 10
    whole = prepare(load_recipe(tiny_recipe, ("data.limit.test=null",)), tiny_recipe)
    assert len(whole.data.test) == len(digits.test)


ABSENT = ("Fashion-MNIST",)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_recipe_is_planned(path: Path) -> None:
    try:
        made = plan(path)
    except (DataError, ParentError) as error:
        absent = [what for what in ABSENT if what in str(error)]
        if not absent:
            raise
        pytest.skip(f"{absent[0]} is not here")
    names = [m.name for m in made.models]
    assert names[-1] == "child"
    assert "anchor" in names or path.parent.name != "ablations"
    assert len(SHIPPED) >= 20
