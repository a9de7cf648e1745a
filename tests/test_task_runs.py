"""Whole runs of tasks without classes, and of timm's models beside transformers' own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from safetensors.torch import load_file
from tiny_run import parents_unexported, recipe, save_parent, undrawn, unproved, write_recipe
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from slimfuse import compress
from slimfuse.families import Dinov2, Shape, family_of
from slimfuse.pipeline import Run
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.stock import verify
from slimfuse.store import Store
from slimfuse.tasks.image_processors import make_processor

torch.set_num_threads(1)


@contextmanager
def quickly() -> Iterator[None]:
    """Leave out what the tests below do themselves, or don't look at."""
    with pytest.MonkeyPatch.context() as patch:
        parents_unexported(patch)
        unproved(patch)
        undrawn(patch)
        yield


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("embedding")
    tiny_text.save_texts(home / "data", (90, 60))
    folders = [tiny_text.save_parent(home / name, seed=i) for i, name in enumerate("ab")]
    content = tiny_text.recipe(
        home / "data", folders, task="sentence-embedding", finetune={"epochs": 6, "lr": 3e-3}
    )
    with quickly():
        return compress(write_recipe(home / "r.yaml", content), out=home / "run")


def test_a_body_without_labels_is_fused_taught_and_opened(embedded: Run) -> None:
    rows = {row.name: row.metrics for row in embedded.report.rows}
    assert list(rows["fused"]) == ["spearman", "neighbour_overlap"]
    assert embedded.report.metric == "spearman"
    # the parents' joint embeddings are the reference, which neither of them is alone
    assert rows["a"]["spearman"].value < 1
    assert rows["finetuned"]["spearman"].value > rows["random-start"]["spearman"].value
    assert rows["onnx"]["spearman"].value == pytest.approx(
        rows["finetuned"]["spearman"].value, abs=1e-2
    )
    model, info = AutoModel.from_pretrained(embedded.model, output_loading_info=True)
    assert not any(info.values()) and model.config.hidden_size == 8
    found = verify(embedded.model)
    assert found.model_class == "BertModel" and found.gap < 1e-5  # the tolerance of verify


def test_a_sentence_encoders_folder_says_how_it_is_pooled(embedded: Run) -> None:
    modules = json.loads((embedded.model / "modules.json").read_text())
    assert [m["path"] for m in modules] == ["", "1_Pooling", "2_Normalize"]
    pooling = json.loads((embedded.model / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 8 and pooling["pooling_mode_mean_tokens"]
    assert not pooling["pooling_mode_cls_token"]
    card = (embedded.model / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card and "attention_mask" in card
    assert "licence of" in card  # nobody says what the parents' is


def test_frozen_tables_of_tokens_stay_as_they_were_fused(tmp_path: Path) -> None:
    tiny_text.save_texts(tmp_path / "data", (40, 30))
    parent = tiny_text.save_parent(tmp_path / "a", seed=0)
    finetune = {"epochs": 1, "lr": 3e-3, "freeze_embeddings": True}
    content = tiny_text.recipe(
        tmp_path / "data", [parent], task="sentence-embedding", finetune=finetune
    )
    path = write_recipe(tmp_path / "r.yaml", content)
    stages = Stages(prepare(load_recipe(path), path), Store(tmp_path))
    folders = [stages.start("fused").path, stages.finetune("fused").path]
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    tables = {name for name in before if name.endswith("_embeddings.weight")}
    assert len(tables) == 3 and tables <= same
    assert not any("layer" in name and "weight" in name for name in same)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A timm ViT and one of transformers become one timm ViT."""
    home = tmp_path_factory.mktemp("mixed")
    save_parent(home / "own", seed=1)
    path = home / "r.yaml"
    parents: list[dict[str, Any]] = [{"name": "own", "from": "own"}]
    content = recipe(family="timm-vit", parents=parents, baselines=[], finetune={"epochs": 0})
    with quickly():
        first = compress(write_recipe(path, content), out=home / "first")
        parents.append({"name": "timm", "from": str(first.model)})
        content = recipe(family="timm-vit", parents=parents, baselines=[], finetune={"epochs": 1})
        return compress(write_recipe(path, content), out=home / "run")


def test_parents_of_both_worlds_become_one_model_that_both_open(mixed: Run) -> None:
    import timm

    own = timm.create_model(f"local-dir:{mixed.model}", pretrained=True).eval()
    assert own.embed_dim == 8
    wrapped = AutoModelForImageClassification.from_pretrained(mixed.model).eval()
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # one and the same function in float32
        torch.testing.assert_close(wrapped(pixel_values=pixels).logits, own(pixels))
    verified = verify(mixed.model)
    assert verified.model_class == own.pretrained_cfg["architecture"] and verified.gap < 1e-5
    assert "library_name: timm" in (mixed.model / "README.md").read_text()
    processor = AutoImageProcessor.from_pretrained(mixed.model)
    assert type(processor).__name__ == "TimmWrapperImageProcessor" or processor.size


def test_a_dinov2_takes_images_of_other_sizes_than_its_positions(tmp_path: Path) -> None:
    family = Dinov2("feature-extraction")
    config = family.new_config(Shape(12, 2, 24, 2), patch_size=2, image_size=14, labels=())
    torch.manual_seed(0)
    model = family.build(config)
    family.save(model, tmp_path / "parent")
    make_processor(8, (0.5,) * 3, (0.5,) * 3).save_pretrained(tmp_path / "parent")
    content = recipe(
        family="dinov2",
        task="feature-extraction",
        target={"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2},
        parents=[{"name": "a", "from": str(tmp_path / "parent")}],
    )
    path = write_recipe(tmp_path / "r.yaml", content)
    job = prepare(load_recipe(path), path)
    assert job.opened.tokens(job.target) == 17 and job.target.image_size == 14
    pixels = job.samples("test")[torch.arange(3)]
    assert pixels.arguments["pixel_values"].shape == (3, 3, 8, 8)
    stages = Stages(job, Store(tmp_path))
    found = stages.evidence(stages.start("fused"))["embeddings"]
    assert found.shape == (60, 8) and bool(torch.isfinite(found).all())


def test_features_of_a_timm_model_without_a_class_token_are_its_patches_mean(
    tmp_path: Path,
) -> None:
    family = family_of("timm-vit", "feature-extraction")
    for seed, name in enumerate("ab"):
        config = family.new_config(
            Shape(12, 2, 24, 2), patch_size=4, image_size=8, class_token=False, reg_tokens=2,
            global_pool="avg", architecture="vit_tiny_patch16_224",
        )  # fmt: skip
        torch.manual_seed(seed)
        family.save(family.build(config), tmp_path / name)
        make_processor(8, (0.5,) * 3, (0.5,) * 3).save_pretrained(tmp_path / name)
    content = recipe(
        family="timm-vit",
        task="feature-extraction",
        target={"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2},
        parents=[{"name": name, "from": str(tmp_path / name)} for name in "ab"],
    )
    path = write_recipe(tmp_path / "r.yaml", content)
    job = prepare(load_recipe(path), path)
    stages = Stages(job, Store(tmp_path / "store"))
    model: Any = job.family.load(tmp_path / "a")
    with torch.no_grad():
        states = model(**job.samples("test")[torch.arange(60)].arguments).last_hidden_state
    assert states.shape == (60, 6, 12)  # two registers before four patches
    found = stages.outputs(job.parents[0]).test["embeddings"]
    # the same float32 sums in batches of another size
    torch.testing.assert_close(found, states[:, 2:].mean(1), rtol=1e-4, atol=1e-5)
    assert stages.evidence(stages.start("fused"))["embeddings"].shape == (60, 8)


def test_a_vit_recipe_takes_timms_models(mixed: Run, tmp_path: Path) -> None:
    content = recipe(parents=[{"name": "timm", "from": str(mixed.model)}], target={
        "hidden_size": 8, "intermediate_size": 12})  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", content)
    stages = Stages(prepare(load_recipe(path), path), Store(tmp_path))
    start = stages.start("fused")
    assert (start.path / "config.json").read_text().count("ViTForImageClassification") == 1
    given = stages.outputs(stages.job.parents[0]).test["logits"]
    # the same shape: the fuse gives the parent back, up to float32 and a ridge of 1e-9
    torch.testing.assert_close(stages.evidence(start)["logits"], given, rtol=1e-3, atol=1e-3)
    assert load_file(start.path / "model.safetensors")
