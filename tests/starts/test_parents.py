"""Starts of several parents: classes, depths and layers that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starts.looking import HALF, MIXED, scores, shown
from tiny_run import events

from slimfuse.errors import UserError
from slimfuse.pipeline.fusion_record import load_fusion


def test_one_of_two_parents_is_fused_and_both_teach(stages: Any, tmp_path: Path) -> None:
    made = stages({"parents": ["b"]}, finetune={"epochs": 0.2})
    job = made.job
    assert [p.name for p in job.by_width] == ["b"]
    assert [p.name for p in job.teachers] == ["a", "b"]
    assert load_fusion(made.start("fused").path)["parents"] == ["b"]
    made.finetune("fused")
    assert not {"outputs-a", "outputs-b"} & set(events(tmp_path, "done"))  # asked as they come


def test_teachers_are_asked_once_where_images_come_again(stages: Any, tmp_path: Path) -> None:
    made = stages({"parents": ["b"]}, finetune={"epochs": 1.2})
    made.finetune("fused")
    assert {"outputs-a", "outputs-b"} <= set(events(tmp_path, "done"))


def test_a_child_of_one_parent_may_be_taught_by_one_that_knows_the_rest(stages: Any) -> None:
    parents = [{"name": "a", "from": "low"}, {"name": "b", "from": "high"}]
    made = stages({"parents": ["b"]}, parents=parents, finetune={"epochs": 0.2},
                  data={"source": "digits", "calibration": {"samples": 64}})  # fmt: skip
    found = scores(made)
    known = found[:, 5:].amax(1) > found[:, :5].amax(1)
    assert bool(known.all())  # what b doesn't know gets the least
    made.finetune("fused")


@pytest.mark.parametrize("method", ["refit", "random-refit", "select", "subclone"])
def test_depth_shrinks(stages: Any, method: str) -> None:
    target = {**HALF, "num_hidden_layers": 0.5}
    made = stages({"method": method}, target, parents=[{"name": "a", "from": "deep"}])
    scores(made)
    assert made.job.family.shape(made.job.target).num_hidden_layers == 2


def test_depth_shrinks_to_one_block(stages: Any) -> None:
    made = stages({}, {**HALF, "num_hidden_layers": 1})
    scores(made)
    assert shown(made) == {"stream", "refit", "errors"}


def test_parents_of_different_depths_and_widths(stages: Any) -> None:
    made = stages({}, {**HALF, "num_hidden_layers": 2}, parents=MIXED)
    scores(made)
    segments = load_fusion(made.start("fused").path)["segments"]
    assert [sum(map(len, parts)) for parts in segments] == [2, 4]  # every block stands somewhere
    assert all(len(parts) == 2 for parts in segments)


def test_ratios_are_of_the_deepest_and_the_widest(stages: Any) -> None:
    target = {"hidden_size": 0.5, "num_attention_heads": 2, "num_hidden_layers": 0.5}
    shape = stages({}, target, parents=MIXED).job.proposal.shape
    assert (shape.hidden_size, shape.num_hidden_layers) == (12, 2)


def test_given_layers_are_taken(stages: Any) -> None:
    target = {**HALF, "num_hidden_layers": 2}
    layers = [[0], [1, 2, 3]]
    made = stages({"layers": layers}, target, parents=[{"name": "a", "from": "deep"}])
    scores(made)
    assert load_fusion(made.start("fused").path)["segments"] == [layers]


@pytest.mark.parametrize("layers", [[[0], [1]], [[0, 1], [2, 3], [4]], [[0, 2], [1, 3]], [[], [0]]])
def test_layers_that_do_not_fit_are_told(stages: Any, layers: list[list[int]]) -> None:
    target = {**HALF, "num_hidden_layers": 2}
    with pytest.raises(UserError) as error:
        stages({"layers": layers}, target, parents=[{"name": "a", "from": "deep"}])
    assert error.value.where == "fuse.layers"
    assert error.value.allowed == "2 lists, one a target block, of the blocks 0 … 3"


def test_parents_of_disjoint_classes(stages: Any) -> None:
    parents = [{"name": "a", "from": "low"}, {"name": "b", "from": "high"}]
    made = stages({}, parents=parents)
    assert [p.places for p in made.job.parents] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    assert made.job.target.num_labels == 10
    assert made.outputs(made.job.parents[1]).test["logits"].shape == (60, 10)
    scores(made)
