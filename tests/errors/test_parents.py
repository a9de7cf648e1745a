"""Parents that don't fit, or are spoiled: one clear error, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from errors.saying import Words, says, two
from safetensors.torch import load_file, save_file
from tiny_run import recipe, save_parent


@pytest.fixture
def slim(saved_parents: Path, tmp_path: Path) -> Path:
    """A saved parent beside the recipe, which a test may spoil."""
    return Path(shutil.copytree(saved_parents / "slim", tmp_path / "slim"))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"image_size": 16}, ("different image sizes", "a has 8, b has 16", "next:")),
        ({"patch_size": 2}, ("the parents don't fit each other", "patch_size: a has 4, b has 2")),
    ],
)
def test_parents_that_differ(
    fails: Callable[..., str], slim: Path, tmp_path: Path, sizes: dict[str, int], words: Words
) -> None:
    save_parent(tmp_path / "other", **sizes)
    says(fails(two()), words)


def test_parents_with_other_labels_than_the_data(fails: Callable[..., str], tmp_path: Path) -> None:
    save_parent(tmp_path / "slim", labels=["cat", "dog"])
    words = ("labels are not the data set's", "parents.a", "got:     2: cat, dog",
             "allowed: 10, or some of them by name: 0, 1, 2, 3, 4, 5, …", "next:")  # fmt: skip
    says(fails(two(second="slim")), words)
    save_parent(tmp_path / "slim", labels=7)
    text = fails(two(second="slim"))
    says(text, ("no parent knows some of the data set's classes", "got:     7, 8, 9", "next:"))


def test_parents_that_prepare_images_differently(
    fails: Callable[..., str], slim: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(slim, tmp_path / "other"))
    edit(other / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    says(fails(two()), ("prepare images differently", "image_mean: a has", "(0.5, 0.5, 0.5)"))


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Save a parent's weights again after a change."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def bert(folder: Path) -> None:
    """Save a model of another family in a parent's place."""
    from transformers import BertConfig

    BertConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(folder)


def cut(folder: Path) -> None:
    """Keep the first half of the weights' file."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(folder: Path) -> None:
    """Leave only a pickle of the weights."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


HEAD = "classifier.weight"
SPOILED: dict[str, tuple[Callable[[Path], object], Words]] = {
    "family": (bert, ("another family", "got:     bert", "allowed: vit")),
    "cut": (cut, ("weights can't be read", "slim", "next:")),
    "garbage": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
        ("weights can't be read", "SafetensorError", "next:"),
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ("weights can't be read",)),
    "missing weight": (
        lambda f: change_weights(f, lambda w: w.pop("classifier.bias")),
        ("don't fit its config", "missing_keys", "classifier.bias", "next:"),
    ),
    "extra weight": (
        lambda f: change_weights(f, lambda w: w.update(extra=w["classifier.bias"].clone())),
        ("don't fit its config", "unexpected_keys", "extra"),
    ),
    "wrong shape": (
        lambda f: edit(f / "config.json", intermediate_size=20),
        ("don't fit its config", "slim", "mismatched_keys", "mlp.fc1.bias", "24", "20"),
    ),
    "no processor": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        ("parent 'a' lacks preprocessor_config.json", "slim", "next:"),
    ),
    "odd processor": (
        lambda f: edit(f / "preprocessor_config.json", size={"height": 9, "width": 8}),
        ("other images than the model takes", "slim/preprocessor_config.json", "3 × 9 × 8"),
    ),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ("parent 'a' is quantised", "quantization_config: gptq", "allowed: float64", "next:"),
    ),
    "whole numbers": (
        lambda f: change_weights(f, lambda w: w.update({HEAD: (w[HEAD] * 100).to(torch.int8)})),
        ("parent 'a' is quantised", f"{HEAD} in I8", "next:"),
    ),
    "pickle": (pickled, ("lacks model.safetensors", "pytorch_model.bin is not read", "next:")),
    "config": (lambda f: (f / "config.json").write_text("{"), ("can't be opened", "config.json")),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_parent(fails: Callable[..., str], slim: Path, case: str) -> None:
    spoil, words = SPOILED[case]
    spoil(slim)
    says(fails(recipe(parents=[{"name": "a", "from": "slim"}])), words)
