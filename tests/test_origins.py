"""Parents' folders: whole or sharded weights, timm's own, GGUF files, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_text import save_parent

from slimfuse.data import gguf
from slimfuse.errors import ParentError
from slimfuse.families import family_of
from slimfuse.pipeline import origins
from slimfuse.pipeline.origins import find_parent, is_timm, weight_files, weights_digest
from slimfuse.store import file_digest
from slimfuse.tasks import TASKS

TEXTS, IMAGES = TASKS["text-classification"], TASKS["image-classification"]
LANGUAGE = TASKS["causal-lm"]


def find(origin: str, beside: Path, task: Any = TEXTS, revision: str | None = None) -> Path:
    return find_parent("a", origin, revision, beside, task)


def shard(folder: Path) -> Path:
    """Save a parent with its weights in several files."""
    save_parent(folder)
    family = family_of("bert", "text-classification")
    model: Any = family.load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_weights_in_several_files_are_taken_and_read(tmp_path: Path) -> None:
    folder = shard(tmp_path / "parts")
    assert find("parts", tmp_path) == folder
    whole = family_of("bert", "text-classification").load(save_parent(tmp_path / "whole"))
    parts = family_of("bert", "text-classification").load(folder)
    assert all(torch.equal(p, parts.state_dict()[k]) for k, p in whole.state_dict().items())


def test_the_digest_is_of_all_files_by_their_names(tmp_path: Path) -> None:
    folder = shard(tmp_path / "parts")
    first = weights_digest(folder)
    assert weights_digest(folder) == first
    one, two, *_ = weight_files(folder)
    content = one.read_bytes(), two.read_bytes()
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    assert weights_digest(folder) != first
    whole = save_parent(tmp_path / "whole")
    assert weights_digest(whole) == file_digest(whole / "model.safetensors")


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = shard(tmp_path / "parts")
    gone = weight_files(folder)[1]
    gone.unlink()
    with pytest.raises(ParentError, match=f"'a' lacks {gone.name}"):
        find("parts", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}',
        '{"weight_map": {"w": "../model.safetensors"}}', '{"weight_map": {"w": "model.bin"}}',
        '{"weight_map": {"w": 3}}',
    ],
)  # fmt: skip
def test_an_index_that_names_nothing_usable_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ParentError, match="index of the weights") as caught:
        weight_files(tmp_path)
    assert str(tmp_path) in str(caught.value.where)


def test_a_folder_of_timm_needs_no_processor(tmp_path: Path) -> None:
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    config = folder / "config.json"
    config.write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 3}))
    assert is_timm(folder) and find("timm", tmp_path, IMAGES) == folder
    config.write_text(json.dumps({"architecture": "x", "model_type": "vit"}))
    assert not is_timm(folder)
    with pytest.raises(ParentError, match=r"lacks preprocessor_config\.json"):
        find("timm", tmp_path, IMAGES)
    config.write_text("[")
    assert not is_timm(folder)


def test_a_timm_folder_is_no_model_of_texts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit"}))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ParentError, match=r"lacks tokenizer\.json"):
        find(str(tmp_path), tmp_path)


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, set[str]]]:
    """Stand in for the conversion: the calls are kept, and a saved parent is given back."""
    calls: list[tuple[Path, set[str]]] = []

    def converted(file: Path, types: set[str], *, where: str | None = None) -> Path:
        assert where == "parents.a.from"
        calls.append((file, set(types)))
        return save_parent(tmp_path / "converted")

    monkeypatch.setattr(origins, "converted", converted)
    return calls


@pytest.mark.parametrize("origin", ["models/x.gguf", "models"])
def test_a_gguf_file_is_converted(
    origin: str, tmp_path: Path, conversions: list[tuple[Path, set[str]]]
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.gguf").touch()
    assert find(origin, tmp_path, LANGUAGE) == tmp_path / "converted"
    ((file, types),) = conversions
    assert file == tmp_path / "models" / "x.gguf" and "llama" in types


def test_of_several_gguf_files_one_has_to_be_named(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").touch()
    (tmp_path / "q8.gguf").touch()
    with pytest.raises(ParentError, match=r"lacks config\.json") as caught:
        find(str(tmp_path), tmp_path, LANGUAGE)
    assert "name one of the folder's .gguf files (q4.gguf, q8.gguf)" in str(caught.value.hint)


def test_a_gguf_file_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match="does not exist") as caught:
        find("models/x.gguf", tmp_path, LANGUAGE)
    assert ".gguf file" in str(caught.value.hint)


def test_a_revision_is_of_hub_ids_alone(tmp_path: Path) -> None:
    save_parent(tmp_path / "here")
    with pytest.raises(ParentError, match="only with a hub id") as caught:
        find("here", tmp_path, revision="main")
    assert caught.value.where == "parents.a.revision"


def test_a_package_may_ship_a_gguf_file(
    tmp_path: Path,
    conversions: list[tuple[Path, set[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = tmp_path / "site"
    (site / "words").mkdir(parents=True)
    (site / "words" / "x.gguf").touch()
    (site / "words-1.dist-info").mkdir()
    (site / "words-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: words\n")
    (site / "words-1.dist-info" / "RECORD").write_text("words/x.gguf,,\n")
    monkeypatch.syspath_prepend(site)
    find("package:words", tmp_path, LANGUAGE)
    assert conversions[0][0] == site / "words" / "x.gguf"


def test_a_hub_id_brings_tokenizer_templates_and_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(save_parent(tmp_path / "fetched"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find("some/model", tmp_path, revision="v1") == tmp_path / "fetched"
    assert (asked["name"], asked["revision"]) == ("some/model", "v1")
    wanted = {"*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"}
    assert wanted <= set(asked["allow_patterns"])
    assert gguf.SUFFIX not in "".join(asked["allow_patterns"])  # a repository may have ten of them
