"""A recipe's `finetune.protect`: what is protected, in the report, through a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import events, folder_bytes, in_child, recipe, save_parent, was_killed, write_recipe

from slimfuse.errors import DataError, RecipeError
from slimfuse.finetune import loop
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.protecting import RECORD, findings, old_samples, read_spaces
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store

LOW, HIGH = [str(i) for i in range(5)], [str(i) for i in range(5, 10)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protecting")
    save_parent(folder / "low", seed=1, labels=LOW)
    save_parent(folder / "high", seed=2, labels=HIGH)
    return folder


def protecting(**keys: Any) -> dict[str, Any]:
    return {"epochs": 2, "batch_size": 32, "protect": {"samples": 2, "energy": 1.0, **keys}}


def opened(home: Path, root: Path, finetune: dict[str, Any], **changes: Any) -> Stages:
    given = {
        "parents": [{"name": n, "from": n} for n in ("low", "high")], "finetune": finetune,
        "target": {"hidden_size": 12, "intermediate_size": 20}, **changes,
    }  # fmt: skip
    root.mkdir(exist_ok=True)
    path = write_recipe(home / f"{root.name}.yaml", recipe(**given))
    return Stages(prepare(load_recipe(path), path), Store(root))


def test_the_samples_are_those_of_the_parents_classes(home: Path, tmp_path: Path) -> None:
    stages = opened(home, tmp_path / "a", protecting(parents=["high"]))
    old = old_samples(stages.job)
    assert old is not None and set(old.train.labels) == set(old.held_out.labels) == set(
        range(5, 10)
    )
    assert old.labels and "5 classes that high know" in old.what
    other = opened(home, tmp_path / "b", protecting(data={"source": "digits"}))
    found = old_samples(other.job)
    assert found is not None and len(found.train) > len(other.job.data.train)  # its own limits
    free = opened(home, tmp_path / "c", {"epochs": 1})
    assert old_samples(free.job) is None


def test_protected_answers_stay_and_the_report_says_so(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = opened(home, tmp_path / "run", protecting(parents=["low"]))
    start, done = stages.start("fused"), stages.finetune("fused")
    said = capsys.readouterr().err
    assert "of the weights' directions may move" in said and "moved by at most" in said
    record = json.loads((done.path / RECORD).read_text())
    # float32 weights: their rounding, not the projection
    assert record["largest_change"] < 1e-4 and 0 < record["plasticity"] < 1
    before, after = (load_file(s.path / "model.safetensors") for s in (start, done))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all("layernorm" not in n and "embeddings" not in n for n in moved)
    layers, forgot = findings(done)
    assert len(layers.rows) == len(record["layers"]) and "energy 1" in layers.conditions
    assert forgot.decision and forgot.rows[2][0] == "its forecast"
    assert "plasticity" in (tmp_path / "run" / "log.jsonl").read_text()
    free = stages.finetune("random-start")  # a baseline has nothing to keep
    assert not (free.path / RECORD).exists()


def test_less_energy_moves_more(home: Path, tmp_path: Path) -> None:
    def spaces(energy: float) -> tuple[Any, ...]:
        stages = opened(home, tmp_path / f"e{energy}", protecting(parents=["low"], energy=energy))
        stages.finetune("fused")
        (folder,) = (stages.store.stages).glob("protected-*")
        return read_spaces(folder)

    full, less = spaces(1.0), spaces(0.6)
    assert [a.layers for a in full] == [b.layers for b in less]
    assert sum(s.plasticity for s in less) > sum(s.plasticity for s in full)


def killed(home: Path, root: Path) -> None:
    loop.CHECKPOINT_SECONDS = 0.0
    stages, steps = opened(home, root, protecting(parents=["low"])), iter(range(6))
    whole = loop._Run.step

    def step(run: Any) -> None:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(run)

    loop._Run.step = step  # type: ignore[method-assign]
    stages.start("fused")
    stages.finetune("fused")


def test_a_killed_run_ends_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    whole = opened(home, tmp_path / "whole", protecting(parents=["low"])).finetune("fused")
    root = tmp_path / "killed"
    assert was_killed(in_child(lambda: killed(home, root), tmp_path / "complaints"))
    assert (tmp_path / "complaints").exists() is False
    again = opened(home, root, protecting(parents=["low"])).finetune("fused")
    assert folder_bytes(again.path).items() - folder_bytes(whole.path).items() <= {
        ("manifest.json", folder_bytes(again.path)["manifest.json"])  # it has the seconds
    }
    assert events(root, "cached").count("protected") == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"finetune": {"protect": {}}}, "doesn't say what is protected"),
        ({"finetune": {"protect": {"parents": ["low"], "data": {"source": "digits"}}}}, "twice"),
        ({"finetune": {"protect": {"parents": ["lo"]}}}, "did you mean 'low'"),
        ({"finetune": {"protect": {"parents": ["low"], "energy": 0}}}, "number > 0 and <= 1"),
        ({"finetune": {"protect": {"parents": ["low"]}, "lora": {}}}, "not adapters"),
        ({"finetune": {"protect": {"parents": ["low"]}}, "sparsify": {"sparsity": 0.5}}, "zero"),
    ],
)
def test_what_does_not_go_together_is_refused(
    home: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    given = recipe(parents=[{"name": n, "from": n} for n in ("low", "high")], **changes)
    path = write_recipe(tmp_path / "bad.yaml", given)
    with pytest.raises(RecipeError, match=told):
        load_recipe(path)


def test_no_sample_left_is_one_clear_error(home: Path, tmp_path: Path) -> None:
    # one training image: one of the parents doesn't know its digit
    data = {"source": "digits", "limit": {"train": 1, "test": 60}, "calibration": {"samples": 1}}
    told = []
    for name in ("low", "high"):
        try:
            opened(home, tmp_path / name, protecting(parents=[name]), data=data)
        except DataError as error:
            told.append(str(error))
    assert len(told) == 1 and "no sample is left to be protected" in told[0]
    assert "finetune.protect" in told[0]
