"""The shipped recipes: every family has one, and those of models that aren't here are outlined."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from slimfuse.families import TASK_FAMILIES
from slimfuse.pipeline import plan
from slimfuse.recipe import Recipe, load_recipe
from slimfuse.recipe.matching import TASK_FAMILIES as NAMED

HOME = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(HOME.rglob("*.yaml"))
OWN = [p for p in SHIPPED if p.parent.name not in ("ablations", "auto")]


def encoder(kind: str, **sizes: int) -> Any:
    return transformers.AutoConfig.for_model(kind, **sizes)


def timm(name: str, classes: int) -> dict[str, Any]:
    record = {"input_size": [3, 224, 224], "num_classes": classes}
    arguments = {"img_size": 224, "num_classes": classes}
    return {
        "architecture": name,
        "num_classes": classes,
        "model_args": arguments,
        "pretrained_cfg": record,
    }


SMALL_BERT = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
RXNFP = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 591}
GROUPS = {"num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, Any] = {
    # configs of the very models, as far as sizes go, by their names in recipes
    "google-bert/bert-base-uncased": lambda: encoder("bert"),
    "sentence-transformers/all-MiniLM-L6-v2": lambda: encoder(
        "bert", num_hidden_layers=6, **SMALL_BERT
    ),
    "sentence-transformers/paraphrase-MiniLM-L3-v2": lambda: encoder(
        "bert", num_hidden_layers=3, **SMALL_BERT
    ),
    "runs/zoo/rxnfp-pretrained": lambda: encoder("bert", **RXNFP),
    "runs/zoo/rxnfp-ft": lambda: encoder("bert", **RXNFP),
    "runs/zoo/rxnfp-ft-10k-25s": lambda: encoder("bert", **RXNFP),
    "FacebookAI/roberta-base": lambda: encoder(
        "roberta", vocab_size=50265, max_position_embeddings=514
    ),
    "distilbert/distilbert-base-uncased": lambda: encoder("distilbert"),
    "sentence-transformers/all-mpnet-base-v2": lambda: encoder(
        "mpnet", max_position_embeddings=514
    ),
    "models/electra-base": lambda: encoder(
        "electra", embedding_size=768, hidden_size=768, num_attention_heads=12,
        intermediate_size=3072,
    ),
    "google/vit-base-patch16-224-in21k": lambda: encoder("vit"),
    "facebook/deit-small-distilled-patch16-224": lambda: encoder(
        "deit", hidden_size=384, num_attention_heads=6, intermediate_size=1536
    ),
    "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k": lambda: timm("vit_base_patch16_224", 1000),
    "facebook/dinov2-small": lambda: encoder(
        "dinov2", hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    ),
    "runs/zoo/dinov2-small": lambda: timm("vit_small_patch14_dinov2", 0),
    "openai-community/gpt2": lambda: transformers.GPT2Config(),
    "HuggingFaceTB/SmolLM2-135M": lambda: transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-1B": lambda: transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-0.5B": lambda: transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-0.6B-Base": lambda: transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True, **GROUPS,
    ),
    "google/gemma-3-270m": lambda: transformers.Gemma3TextConfig(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256,
    ),
}  # fmt: skip
SHRUNK = {
    "bert/base-half.yaml": (768, 384),
    "vit/base-half.yaml": (768, 384),
    "llama/1b-half.yaml": (2048, 1024),
    "llama/smollm2.yaml": (576, 384),
    "gemma3/270m-half.yaml": (640, 320),
}


def origins(recipe: Recipe) -> dict[str, str]:
    """Return the key and the name of every model that is not trained from scratch."""
    found = {}
    for i, parent in enumerate(recipe.parents):
        if parent.from_ is not None:
            found[f"parents.{i}.from"] = parent.from_
        elif parent.train is not None and parent.train.start is not None:
            found[f"parents.{i}.train.start"] = parent.train.start
    return found


@pytest.mark.parametrize("path", OWN, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_lies_with_its_family_and_says_what_it_needs(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    assert recipe.family == path.parent.name and recipe.family in NAMED[recipe.task]
    assert recipe.family in TASK_FAMILIES[recipe.task], "the library knows the pair"
    header = re.split(r"^version:", path.read_text(), maxsplit=1, flags=re.M)[0]
    assert all(line.startswith("# ") for line in header.splitlines()) and "# Needs: " in header


def test_every_family_and_every_task_has_a_recipe() -> None:
    recipes = [load_recipe(path) for path in OWN]
    assert {r.family for r in recipes} == {f for families in NAMED.values() for f in families}
    assert {r.task for r in recipes} == set(NAMED)
    names = [load_recipe(path).name for path in SHIPPED]
    assert len(set(names)) == len(names), "runs of two recipes would share a folder"


def test_the_table_names_every_recipe() -> None:
    table = (HOME / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)#]+)\)", table))
    wanted = {path.relative_to(HOME).as_posix() for path in OWN}
    assert wanted <= linked
    assert all((HOME / link).exists() for link in linked if "://" not in link), linked


@pytest.mark.parametrize(
    "path",
    [p for p in OWN if isinstance(r := load_recipe(p), Recipe) and origins(r)],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_a_recipe_of_models_that_are_not_here_is_outlined(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    overrides = []
    for i, (key, name) in enumerate(origins(recipe).items()):
        folder, config = tmp_path / str(i), MODELS[name]()
        folder.mkdir()
        if isinstance(config, dict):
            (folder / "config.json").write_text(json.dumps(config))
        else:
            config.save_pretrained(folder)
        overrides.append(f"{key}={folder}")
    made = plan(path, overrides=tuple(overrides), outline=True)
    *parents, child = made.models
    assert len(parents) == len(recipe.parents) and child.params < min(p.params for p in parents)
    widths = SHRUNK.get(path.relative_to(HOME).as_posix())
    if widths is not None:
        assert parents[0].shape.startswith(f"{widths[0]} wide")
        assert child.shape.startswith(f"{widths[1]} wide")
