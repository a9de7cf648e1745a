"""Every way from parents to a start, through a recipe: what is made, what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import SHAPE, TRAIN, events, recipe, save_parent, write_recipe
from torch import Tensor

from slimfuse.errors import ParentError, ShapeError, UserError
from slimfuse.families import ViT
from slimfuse.fuse.refit import Parent, Settings, refit
from slimfuse.fuse.transport_policies import TransportSettings
from slimfuse.pipeline import compress, package
from slimfuse.pipeline import run as story
from slimfuse.pipeline.fusion_record import load_fusion
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.lock import lock_of
from slimfuse.pipeline.pictures import pictures
from slimfuse.pipeline.run import prepare_again
from slimfuse.pipeline.stages import Stages
from slimfuse.pipeline.starts import METHODS, solver_of
from slimfuse.pipeline.timing import Timer
from slimfuse.recipe import Fuse, Ot, load_recipe
from slimfuse.report.figures import draw
from slimfuse.store import Store

ABLATIONS = sorted((Path(__file__).parents[1] / "recipes" / "ablations").glob("*.yaml"))
HALF = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
SAME = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TWINS = [{"name": "a", "from": "slim"}, {"name": "b", "from": "twin"}]
MIXED = [{"name": "a", "from": "wide"}, {"name": "b", "from": "deep"}]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random parents: `slim` and `twin` of one shape, `wide`, `deep`, and half-wide `anchor`."""
    root = tmp_path_factory.mktemp("zoo")
    save_parent(root / "slim")
    save_parent(root / "twin", seed=1)
    save_parent(root / "wide", seed=2, hidden_size=24, num_attention_heads=4, intermediate_size=32)
    save_parent(root / "deep", seed=3, num_hidden_layers=4)
    save_parent(root / "anchor", seed=4, hidden_size=8, intermediate_size=12)
    save_parent(root / "odd", seed=5, labels=[str(i) for i in reversed(range(10))])
    save_parent(root / "low", seed=6, labels=[str(i) for i in range(5)])
    save_parent(root / "high", seed=7, labels=[str(i) for i in range(5, 10)])
    return root


@pytest.fixture
def stages(zoo: Path, tmp_path: Path) -> Any:
    """Return a function from a recipe's changes to its stages."""

    def make(fuse: dict[str, Any] | None = None, target: Any = HALF, **changes: Any) -> Stages:
        content = recipe(**{"parents": TWINS, **changes})
        content |= {"fuse": fuse or {}, "target": target}
        path = write_recipe(zoo / f"{tmp_path.name}.yaml", content)
        return Stages(prepare(load_recipe(path), path), Store(tmp_path))

    return make


def scores(made: Stages, kind: str = "fused") -> Tensor:
    """Return a start's test logits, checked to be those of a model that looks at its images."""
    found = made.evidence(made.start(kind))["logits"]
    assert found.shape == (60, 10) and bool(torch.isfinite(found).all())
    assert not bool((found == found[0]).all())
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def shown(made: Stages) -> set[str]:
    """Return the groups of the report's pictures of the start; none may crash."""
    fused = made.start("fused")
    names = {p.name for p in made.job.parents}
    tested = {n: {"logits": torch.zeros(60, 10)} for n in (*names, "finetuned")}
    best = min(names)
    found = pictures(made.job, fused, {}, best, tested)
    assert all(draw(p).startswith("<svg") for p in found)
    return {p.group for p in found}


ANCHOR = {"anchor": {"from": "anchor"}}


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


# -- several parents, depths, layers ------------------------------------------------------------


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


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fuse", "target", "parents", "words"),
    [
        ({"method": "vanilla"}, HALF, TWINS, "vanilla averages parents of one shape, the target's"),
        ({"method": "vanilla"}, SAME, MIXED, "vanilla averages parents of one shape"),
        ({"method": "gauge"}, HALF, MIXED, "gauge averages parents of one shape"),
        ({"method": "ot", "ot": ANCHOR}, {**HALF, "num_hidden_layers": 2}, MIXED,
         "moves parents of the target's depth"),
        ({"method": "ot", "ot": ANCHOR}, SAME, TWINS, "anchor is not of the target's shape"),
        ({"method": "subclone"}, {**HALF, "num_hidden_layers": 3}, MIXED, "a has too few"),
        ({"method": "select"}, {**HALF, "num_hidden_layers": 3}, MIXED, "a has too few"),
        ({"parents": ["a"]}, {**HALF, "hidden_size": 22},
         [{"name": "a", "from": "slim"}, {"name": "b", "from": "wide"}], "fuse.parents"),
    ],
)  # fmt: skip
def test_shapes_that_a_method_cannot_take(
    stages: Any, fuse: dict[str, Any], target: Any, parents: Any, words: str
) -> None:
    with pytest.raises(ShapeError) as error:
        stages(fuse, target, parents=parents)
    told = str(error.value)
    assert words in told and "got:" in told and str(error.value.where).startswith("fuse.")
    assert error.value.hint is not None or error.value.allowed is not None


@pytest.mark.parametrize(
    ("fuse", "parents", "words", "where"),
    [
        ({"method": "gauge"}, ["odd", "slim"], "a has them in another order", "fuse.method"),
        ({"method": "gauge"}, ["low", "high"], "a knows 5 of 10; b knows 5 of 10", "fuse.method"),
        ({"method": "select"}, ["low", "high"], "a knows 5 of 10", "fuse.method"),
        ({"method": "ot", "ot": {"anchor": {"from": "odd"}}}, ["slim", "twin"],
         "10: 9, 8, 7", "fuse.ot.anchor"),
    ],
)  # fmt: skip
def test_classes_that_a_method_cannot_take(
    stages: Any, fuse: dict[str, Any], parents: list[str], words: str, where: str
) -> None:
    listed = [{"name": n, "from": f} for n, f in zip("ab", parents, strict=True)]
    target = SAME if "ot" in fuse else HALF
    with pytest.raises(ParentError) as error:
        stages(fuse, target, parents=listed)
    assert words in str(error.value.got) and error.value.where == where


def test_teachers_that_do_not_know_all_classes(stages: Any) -> None:
    parents = [{"name": "a", "from": "low"}, {"name": "b", "from": "high"}]
    with pytest.raises(ParentError) as error:
        stages({}, parents=parents, finetune={"distill": {"teachers": ["a"]}})
    assert error.value.where == "finetune.distill.teachers"


def test_a_baseline_without_its_anchor_is_refused(stages: Any) -> None:
    with pytest.raises(ParentError, match="none is given") as error:
        stages({}, baselines=["random", "ot"])
    assert error.value.where == "baselines" and "fuse.ot.anchor" in str(error.value.hint)


def test_an_anchor_with_other_preprocessing_is_refused(stages: Any, zoo: Path) -> None:
    folder = save_parent(zoo / "tilted", hidden_size=8, intermediate_size=12)
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    with pytest.raises(ParentError, match="prepare images differently") as error:
        stages({"method": "ot", "ot": {"anchor": {"from": "tilted"}}})
    assert "anchor has False" in str(error.value.got)


# -- budgets ------------------------------------------------------------------------------------


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


# -- whole runs ---------------------------------------------------------------------------------


def test_a_run_of_the_published_method_with_many_baselines(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "verify", lambda *_, **__: None)
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


@pytest.mark.parametrize("key", ["stream", "units"])
def test_a_softness_that_cannot_be_had_is_the_recipes_error(stages: Any, key: str) -> None:
    made = stages({key: "ot", "ot": {"solver": "sinkhorn", "effective_units": 1000.0}})
    with pytest.raises(UserError, match="can't be solved as asked"):
        made.start("fused")


def test_a_parent_that_says_nothing_is_refused(zoo: Path, tmp_path: Path) -> None:
    family = ViT()
    good, dead = (family.load(zoo / "slim") for _ in range(2))
    with torch.no_grad():
        for p in dead.parameters():
            p.zero_()
    target = family.build(good.config)
    pixels = torch.randn(40, 3, *[good.config.image_size] * 2)
    with pytest.raises(ParentError, match="nought"):
        refit([Parent("a", good), Parent("b", dead)], target, family, lambda: [pixels],
              Settings(), n_batches=1)  # fmt: skip
    with torch.no_grad():
        dead.classifier.bias[0] = float("nan")
    dead.save_pretrained(tmp_path / "nan")
    with pytest.raises(ParentError, match="nan or inf") as caught:
        family.load(tmp_path / "nan")
    assert "classifier.bias" in str(caught.value.got)
