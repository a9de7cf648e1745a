"""Starts within a budget, and whole runs with many baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starts.looking import HALF, SAME, TWINS, scores
from tiny_run import parents_unexported, recipe, undrawn, unproved, write_recipe

from slimfuse.errors import ShapeError
from slimfuse.pipeline import compress
from slimfuse.pipeline import run as story
from slimfuse.pipeline.fusion_record import load_fusion
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.lock import lock_of
from slimfuse.pipeline.run import prepare_again
from slimfuse.pipeline.timing import Timer
from slimfuse.recipe import load_recipe
from slimfuse.store import Store


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_a_counted_budget_is_met(stages: Any, kind: str) -> None:
    made = stages({}, {"budget": {kind: 0.4}})
    option = made.job.proposal.chosen
    assert getattr(option, f"{kind}_ratio") <= 0.4
    scores(made)


def test_a_latency_budget_is_measured_once_a_run(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def ratio(_: Timer, config: Any) -> float:
        """Time that falls with the width, and is another in every run."""
        timed.append(config.hidden_size)
        return float(config.hidden_size) / 16 * (0.8 if len(timed) < 9 else 1.6)

    monkeypatch.setattr(Timer, "__call__", ratio)
    path = write_recipe(
        zoo / "timed.yaml",
        recipe(parents=TWINS) | {"target": {"budget": {"latency_ratio": 0.5}}},
    )
    spec, store = load_recipe(path), Store(tmp_path)
    job = prepare_again(spec, path, store)
    assert timed and job.proposal.shape.hidden_size == 10  # 10 / 16 * 0.8 = 0.5
    assert [ratio for _, ratio in job.proposal.measured] == [w / 16 * 0.8 for w in timed]
    story.write_lock(story.lock_text(job), store)
    timed[:] = [0] * 9
    again = prepare_again(spec, path, store)
    assert again.proposal.shape == job.proposal.shape and len(timed) == 9
    assert lock_of(again) == lock_of(job)
    assert prepare(spec, path).proposal.shape != job.proposal.shape  # where nothing is kept


def test_a_budget_that_nothing_meets_is_told(stages: Any) -> None:
    with pytest.raises(ShapeError, match="no legal shape meets the budget") as error:
        stages({}, {"budget": {"params": 10}})
    assert error.value.where == "target.budget.params"


def test_a_run_of_the_published_method_with_many_baselines(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unproved(monkeypatch)
    undrawn(monkeypatch)
    parents_unexported(monkeypatch)
    baselines = ["random", "refit", "gauge", "select", "subclone", "random-refit"]
    spec = recipe(parents=TWINS, finetune={"epochs": 0.2}, baselines=baselines)
    spec |= {
        "target": HALF,
        "export": {"quantize": {"mode": "none"}},
        "fuse": {
            "method": "ot",
            "ot": {"solver": "sinkhorn", "reg": 1e-4, "anchor": {"from": str(zoo / "anchor")}},
        },
    }
    run = compress(write_recipe(zoo / "published.yaml", spec), out=tmp_path / "run")
    rows = {row.name: row for row in run.report.rows}
    assert list(rows) == [
        "a", "b", "anchor", "fused", "finetuned", "onnx", "random-start", "refit", "gauge",
        "select", "subclone", "random-refit",
    ]  # fmt: skip
    assert "trained narrow model" in rows["anchor"].note
    assert "transport" in {p.group for p in run.report.pictures}
    assert any("transport maps did not converge" in w for w in run.report.warnings)
    lock = (run.folder / "recipe.lock.yaml").read_text()
    assert str(zoo) not in lock and "…/anchor" in lock and "anchor: " in lock.split("sha256")[1]
    assert (run.folder / "report.html").is_file()


def test_the_unions_calibration_is_part_of_the_training(stages: Any) -> None:
    parents = [{"name": "a", "from": "low"}, {"name": "b", "from": "high"}]

    def key(samples: int) -> str:
        data = {"source": "digits", "calibration": {"samples": samples}}
        made = stages({"method": "random"}, parents=parents, data=data, finetune={"epochs": 0.2})
        return str(made.finetune("fused").key)

    assert key(70) != key(90)


def test_the_control_of_a_gauge_average_is_refitted_like_it(stages: Any) -> None:
    made = stages({"method": "gauge"}, SAME)
    record = load_fusion(made.start("random-refit").path)
    assert {p["part"] for p in record["repaired"]} >= {"q_proj", "fc1", "fc2", "classifier"}
    plain = load_fusion(stages({"method": "refit"}, SAME).start("random-refit").path)
    assert {p["part"] for p in plain["parts"]} == {"o_proj", "fc2", "classifier"}
