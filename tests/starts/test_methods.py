"""Every way from parents to a start, through a recipe: what is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from starts.looking import ANCHOR, HALF, SAME, TWINS, scores, shown
from tiny_run import SHAPE, TRAIN, events
from torch import Tensor

from slimfuse.fuse.transport_policies import TransportSettings
from slimfuse.pipeline.fusion_record import load_fusion
from slimfuse.pipeline.starts import METHODS, solver_of
from slimfuse.recipe import Fuse, Ot, load_recipe

ABLATIONS = sorted((Path(__file__).parents[2] / "recipes" / "ablations").glob("*.yaml"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("fuse", "groups"),
    [
        ({}, {"stream", "refit", "errors"}),
        ({"units": "ot", "stream": "gradient-pca", "heads": "merge"},
         {"stream", "refit", "errors"}),
        ({"ridge": 0.01, "units": "cluster"}, {"stream", "refit", "errors"}),
        ({"method": "gauge"}, {"alignment", "stream", "refit", "errors"}),
        ({"method": "gauge", "refit": False}, {"alignment", "errors"}),
        ({"method": "gauge", "alignment": "soft", "refit": False}, {"alignment", "errors"}),
        ({"method": "gauge", "alignment": "none", "refit": False}, {"errors"}),
        ({"method": "ot", "ot": ANCHOR}, {"transport", "errors"}),
        ({"units": "ziplm"}, {"stream", "refit", "errors"}),
        ({"units": "saliency", "saliency": "mask-fisher"}, {"stream", "refit", "errors"}),
        ({"method": "ot", "saliency": "taylor", "parent_weights": "fisher",
          "ot": {**ANCHOR, "masses": "saliency"}}, {"transport", "errors"}),
        ({"method": "intra"}, {"transport", "errors"}),
        ({"method": "intra", "saliency": "uniform", "ot": {"cost": "weights"}},
         {"transport", "errors"}),
        ({"method": "select"}, {"errors"}),
        ({"method": "subclone"}, {"errors"}),
        ({"method": "random"}, {"errors"}),
        ({"method": "random-refit"}, {"stream", "refit", "errors"}),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),
)  # fmt: skip
def test_every_method_makes_a_whole_narrower_model(
    stages: Any, fuse: dict[str, Any], groups: set[str]
) -> None:
    made = stages(fuse)
    scores(made)
    record = load_fusion(made.start("fused").path)
    assert record["method"] == fuse.get("method", "refit")
    assert shown(made) == groups


@pytest.mark.parametrize(
    "fuse",
    [
        {"method": "vanilla"},
        {"method": "gauge"},
        {"method": "gauge", "refit": False},
        {"method": "gauge", "alignment": "permutation", "refit": False},
        {"method": "ot", "ot": {"anchor": {"from": "slim"}}},
    ],
    ids=str,
)
def test_equal_shapes_fuse_to_their_own_shape(stages: Any, fuse: dict[str, Any]) -> None:
    made = stages(fuse, SAME)
    scores(made)
    assert made.job.family.shape(made.job.target) == made.job.family.shape(
        made.job.parents[0].config
    )
    assert shown(made) >= {"errors"}


def test_vanilla_is_the_weighted_mean(stages: Any, zoo: Path) -> None:
    parents = [TWINS[0], {**TWINS[1], "weight": 3}]
    made = weights(stages({"method": "vanilla"}, SAME, parents=parents).start("fused").path)
    a, b = weights(zoo / "slim"), weights(zoo / "twin")
    for name, value in made.items():
        # float64 mean of float32 parameters: one rounding
        torch.testing.assert_close(value, 0.25 * a[name] + 0.75 * b[name], rtol=1e-6, atol=1e-7)


def test_an_anchor_of_weight_one_is_the_model(stages: Any, zoo: Path) -> None:
    made = stages({"method": "ot", "ot": {**ANCHOR, "anchor_weight": 1.0}})
    found, wanted = weights(made.start("fused").path), weights(zoo / "anchor")
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_an_anchor_is_trained_in_the_run_and_only_where_it_is_needed(
    stages: Any, tmp_path: Path
) -> None:
    config = {**SHAPE, **HALF}
    train = {**TRAIN, "config": config, "epochs": 1, "seed": 5}
    made = stages(
        {"ot": {"anchor": {"train": train}, "residual": "none"}}, baselines=["ot", "random"]
    )
    made.start("fused")
    assert events(tmp_path, "start") == ["fused"]
    made.start("ot")
    assert events(tmp_path, "start") == ["fused", "parent-anchor", "ot"]
    record = load_fusion(made.start("ot").path)
    assert record["weights"] == pytest.approx([1 / 3] * 3)  # as much as a parent each
    assert {m["parent"] for m in record["maps"]} == {"a", "b"}


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_every_ablation_runs_on_tiny_models(stages: Any, path: Path) -> None:
    lock = load_recipe(path).to_lock()["fuse"]
    anchor = {"from": "slim" if path.stem == "equal-width" else "anchor"}
    fuse = {"method": "ot", "parents": lock["parents"], "ot": {**lock["ot"], "anchor": anchor}}
    made = stages(fuse, SAME if path.stem == "equal-width" else HALF)
    scores(made)
    assert len(ABLATIONS) >= 20


def test_defaults_of_transport_are_those_of_the_method() -> None:
    ot, method = Ot(), TransportSettings()
    for key in ("cost", "masses", "residual", "qk", "heads", "tokens", "window", "anchor_weight"):
        assert getattr(ot, key) == getattr(method, key), key
    assert solver_of(ot) == method.solver
    assert solver_of(Ot(solver="sinkhorn")).reg == 0.05
    assert solver_of(Ot(solver="sinkhorn", effective_units=4.0)).reg is None
    assert set(METHODS) == set(Fuse.model_fields["method"].annotation.__args__)  # type: ignore[union-attr]
