"""Recipes of plain nets: their errors with lines, whole runs, what a second run repeats."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import events, folder_bytes, write_recipe
from typer.testing import CliRunner

from slimfuse.cli import app
from slimfuse.data import load_digits
from slimfuse.errors import CheckFailed, DataError, ParentError, RecipeError, ShapeError, UserError
from slimfuse.nets import (
    Classifier,
    MLPConfig,
    ResNetConfig,
    VGGConfig,
    build,
    footprint,
    load,
    load_config,
    new_classifier,
    prune,
    pruned_config,
)
from slimfuse.pipeline import Run, compare, compress, plan
from slimfuse.pipeline.fusion_record import load_fusion
from slimfuse.pipeline.nets_job import prepare_nets
from slimfuse.pipeline.nets_stages import NetStages
from slimfuse.recipe import NetRecipe, load_recipe, recipe_schema
from slimfuse.report import from_json
from slimfuse.stock import verify
from slimfuse.store import Store
from slimfuse.tasks.image_classification import make_processor

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
FAMILY_NAMES = (
    "vit, deit, dinov2, timm-vit, bert, roberta, distilbert, mpnet, electra, gpt2, llama, qwen2, "
    "qwen3, gemma3, auto"
)
SHIPPED = sorted((ROOT / "recipes" / "auto").glob("*.yaml"))
MLP = {"architecture": "mlp", "hidden": [12, 7]}
TRAIN = {"config": MLP, "epochs": 3, "batch_size": 32, "lr": 5e-3}
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "nets",
    "family": "auto",
    "task": "image-classification",
    "data": {
        "source": "digits",
        "limit": {"train": 150, "test": 60},
        "calibration": {"samples": 70},
    },
    "parents": [
        {"name": "a", "train": {**TRAIN, "shard": "1/2", "seed": 0}, "weight": 2.0},
        {"name": "b", "train": {**TRAIN, "shard": "2/2", "seed": 1}},
        {"name": "slim", "pruned": {"of": "a", "ratio": 0.4}},
    ],
    "fuse": {"parents": ["a", "b"], "batch_size": 32},
    "finetune": {"epochs": 1, "batch_size": 32, "distill": {"teachers": ["a", "b"]}},
    "baselines": ["vanilla", "unfused", "random"],
    "export": {"quantize": {"mode": "dynamic"}},
    "bench": {"threads": [1], "batch": [1], "warmup": 1, "min_seconds": 0.02},
    "runtime": {"threads": 1, "precision": "fp32"},
}
Build = Callable[..., Path]


def changed(**changes: Any) -> dict[str, Any]:
    """Return the recipe with dotted keys (`fuse__anchor`) replaced."""
    made = copy.deepcopy(RECIPE)
    for dotted, value in changes.items():
        *way, last = dotted.split("__")
        place = made
        for key in way:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = value
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Build:
    """Write a changed recipe and return its path."""
    return lambda **changes: write_recipe(tmp_path / "nets.yaml", changed(**changes))


@pytest.fixture(scope="module")
def net_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipes") / "nets.yaml", RECIPE)


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


def save_net(folder: Path, config: Any, *, seed: int = 0) -> Path:
    """Save a random net with its processor."""
    torch.manual_seed(seed)
    new_classifier(config).save_pretrained(folder)
    data = load_digits()
    make_processor(8, data.mean, data.std).save_pretrained(folder)
    return folder


# ---- what loads


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert path.read_text().startswith("# ")
    loaded = load_recipe(path)
    assert isinstance(loaded, NetRecipe)
    lock = loaded.to_lock()
    assert NetRecipe.model_validate(json.loads(json.dumps(lock))).to_lock() == lock


def test_there_is_a_recipe_for_every_original_case() -> None:
    assert {p.stem for p in SHIPPED} == {
        "mlp-equal", "mlp-narrow", "vgg-equal", "vgg-pruned", "resnet",
    }  # fmt: skip


def test_shipped_recipes_on_digits_have_a_plan() -> None:
    for path in SHIPPED:
        made = plan(path, overrides=("data.source=digits", "data.image_size=28"))
        assert made.models[-1].name == "child" and made.proposal is None
        assert made.models[-1].params <= max(m.params for m in made.models)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"family": "atuo"},
            [f"family: unknown value; did you mean 'auto'? got: 'atuo'; allowed: {FAMILY_NAMES}"],
        ),
        (
            {"parents__0__train__config": {"architecture": "vgg", "features": [4, "P"],
                                           "stages": [3]}},
            [
                "parents[0].train.config.features[1]: neither channels nor a pooling; got: 'P'; "
                "allowed: M or integer >= 1",
                "parents[0].train.config.stages: has no effect: architecture is 'vgg'; "
                "allowed: null",
            ],
        ),
        (
            {"parents__0__train__config": {"architecture": "resnet", "stages": [3, 4],
                                           "blocks": [1], "inner": [2, 2]}},
            [
                "parents[0].train.config.blocks: does not fit stages; allowed: 2 numbers, one a "
                "stage",
                "parents[0].train.config.inner: does not fit blocks; allowed: 1 numbers, one a "
                "block",
            ],
        ),
        (
            {"parents__0__train__config": {"architecture": "resnet", "stages": [3]}},
            ["parents[0].train.config.blocks: missing key: architecture 'resnet' needs it"],
        ),
        (
            {"parents__2__pruned__of": "c", "fuse__anchor": {"parent": "slim", "weight": 2.0}},
            [
                "parents[2].pruned.of: no such parent; got: 'c'; allowed: a, b, slim",
                "fuse.anchor.weight: has no effect: a parent's weight stands with the parent; "
                "got: 2.0; allowed: with from or train",
                "fuse.anchor.parent: is not fused: not in fuse.parents; got: 'slim'; "
                "allowed: a, b",
            ],
        ),
        (
            {"parents__0": {"name": "a", "pruned": {"of": "b"}}},
            ["parents[0].pruned.of: must stand before the net that is pruned from it; got: 'b'"],
        ),
        (
            {"parents__1__pruned": {"of": "a"}, "parents__1__name": "vanilla",
             "fuse__anchor": {}, "fuse__parents": ["a"]},
            [
                "parents[1].pruned: stands beside 'train'; allowed: one of the two",
                "parents[1].name: is the name of a report row; got: 'vanilla'; allowed: any but "
                "fused, finetuned, onnx, onnx-int8, random-start, anchor, ot, vanilla, unfused, "
                "sparse, sparse-woodfisher, sparse-woodtaylor, sparse-diagonal-fisher, "
                "sparse-magnitude, sparse-random",
                "fuse.anchor: missing key: needs one of 'parent', 'from', 'train'",
                "finetune.distill.teachers[1]: no such parent; got: 'b'; allowed: a, vanilla, slim",
            ],
        ),
        (
            {"target__widths": [3, 0], "fuse__ot": {"reg": 0.1}},
            [
                "fuse.ot.reg: has no effect: solver is 'emd'; got: 0.1; allowed: with another "
                "solver",
                "target.widths: neither a ratio nor a list of widths; got: a list; allowed: "
                "number > 0 and <= 1 or a list of 1 or more, each integer >= 1 or null",
            ],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_lines(
    recipe: Build, changes: dict[str, Any], lines: list[str]
) -> None:
    path = recipe(**changes)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    found = str(caught.value).replace(f"{path}:", "").split("\n")
    numbers, texts = zip(*(line.split(": ", 1) for line in found), strict=True)
    assert sorted(texts) == sorted(lines)
    text = path.read_text().splitlines()
    for number, problem in zip(numbers, texts, strict=True):
        key = problem.split(":")[0].split(".")[-1].split("[")[0]
        assert key in text[int(number) - 1] or "[" in problem.split(":")[0]


def test_an_unknown_family_is_the_only_complaint(recipe: Build) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(family="elmo"))
    assert str(caught.value).endswith(f"got: 'elmo'; allowed: {FAMILY_NAMES}")
    assert "\n" not in str(caught.value)


def test_the_schema_knows_both_families() -> None:
    schema = recipe_schema()
    names = [option["$ref"].rpartition("/")[2] for option in schema["oneOf"]]
    assert names == ["Recipe", "NetRecipe"]
    declared, plain = (schema["$defs"][name]["properties"]["family"] for name in names)
    assert ", ".join([*declared["enum"], plain["const"]]) == FAMILY_NAMES
    assert all(set(schema["required"]) <= set(schema["$defs"][n]["required"]) for n in names)


# ---- what can be known to fail fails before any work


@pytest.mark.parametrize(
    ("changes", "error", "where", "text"),
    [
        ({"target__widths": 0.5}, ShapeError, "target.widths", "anchor's widths"),
        ({"target__widths": [3]}, ShapeError, "target.widths", "don't fit the net"),
        (
            {"fuse__parents": ["a", "slim"], "fuse__method": "vanilla", "baselines": []},
            ShapeError, "fuse.method", "slim: [7, 4]",
        ),
        ({"fuse__parents": ["a"], "baselines": []}, ParentError, "fuse.method", "beside"),
        (
            {"parents__1__train__config": {"architecture": "mlp", "hidden": [7]}},
            ParentError, "parents.b", "hidden [7]",
        ),
        (
            {"parents__1__train__config": {"architecture": "vgg", "features": [4]}},
            ParentError, "parents.b", "more than the widths",
        ),
        (
            {"parents__1__train__config":
                {"architecture": "vgg", "features": ["M", "M", "M", "M"], "hidden": [4]}},
            UserError, "parents.b", "poolings",
        ),
        ({"parents__1__train__shard": "1/200"}, DataError, "parents.b.train.shard", "shards"),
        (
            {"parents__2__pruned__train": {"epochs": 1, "shard": "1/200"}},
            DataError, "parents.slim.pruned.train.shard", "shards",
        ),
        (
            {"fuse__anchor": {"train": {**TRAIN, "config": {**MLP, "hidden": [3]}}}},
            ParentError, "fuse.anchor", "more than the widths",
        ),
    ],
)  # fmt: skip
def test_misfits_are_told_with_the_line(
    recipe: Build, changes: dict[str, Any], error: type[UserError], where: str, text: str
) -> None:
    path = recipe(**changes)
    with pytest.raises(error) as caught:
        plan(path)
    told = caught.value.where
    assert told is not None and told.startswith(f"{path}:") and where in told
    assert text in str(caught.value)


def test_saved_parents_must_know_the_datas_classes(recipe: Build, tmp_path: Path) -> None:
    labels = tuple(load_digits().classes)
    for config, text in (
        (MLPConfig(192, (5,), 9), "9: without names"),
        (MLPConfig(192, (5,), 10, labels[::-1]), "10: 9, 8"),
    ):
        save_net(tmp_path / "net", config)
        parents = [{"name": "a", "from": "net"}]
        with pytest.raises(DataError, match=text):
            plan(recipe(parents=parents, fuse={}, baselines=[], finetune={}))
    save_net(tmp_path / "net", MLPConfig(100, (5,), 10))
    with pytest.raises(ParentError, match="doesn't take the data's images"):
        plan(recipe(parents=parents, fuse={}, baselines=[], finetune={}))


def test_compare_refuses_plain_nets(net_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="declared families only") as caught:
        compare(net_recipe, out=tmp_path)
    assert caught.value.where is not None and caught.value.where.startswith(f"{net_recipe}:")


# ---- the parts


@pytest.mark.parametrize(
    "config",
    [
        MLPConfig(192, (12, 7)),
        VGGConfig(3, 8, (5, "M", 9, 7), (6,), batch_norm=True),
        ResNetConfig(3, (8, 6), (1, 2), (5, 3, 7)),
    ],
    ids=lambda config: config.architecture,
)
def test_a_pruned_net_has_the_config_that_was_foretold(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 8, 8)
    dense = build(config)
    before = dense(example)
    slim_config = pruned_config(config, example, 0.5)
    slim = Classifier(prune(dense, example, 0.5), slim_config)
    assert torch.equal(dense(example), before), "the dense net stays as it was"
    assert all(0 < s < d for s, d in zip(slim_config.widths, config.widths, strict=True))
    slim.save_pretrained(tmp_path)
    assert load_config(tmp_path) == slim_config
    assert torch.equal(load(tmp_path)(example), slim(pixel_values=example).logits)


def test_pruning_keeps_the_units_of_largest_norm() -> None:
    net = build(MLPConfig(12, (5,), 3))
    first = net.layers[0]
    with torch.no_grad():
        first.weight.copy_(torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])[:, None].expand(5, 12))
        net.layers[2].weight.fill_(1.0)
        first.bias.zero_()
    slim = prune(net, torch.zeros(2, 1, 3, 4), 0.4)
    assert slim.layers[0].weight[:, 0].tolist() == [3.0, 5.0, 4.0]


def test_a_footprint_is_counted_as_by_hand() -> None:
    found = footprint(MLPConfig(192, (12, 7), 10), 8)
    assert found.params == 193 * 12 + 13 * 7 + 8 * 10
    assert found.flops == 2 * (192 * 12 + 12 * 7 + 7 * 10)
    # flattened pixels, two layers each with its ReLU, logits
    assert (found.activations, found.outputs) == (192 + 2 * 12 + 2 * 7 + 10, 10)
    conv = footprint(VGGConfig(3, 8, (4, "M"), (), 10), 8)
    assert conv.flops == 2 * (64 * 27 * 4 + 64 * 10)


# ---- a whole run


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
