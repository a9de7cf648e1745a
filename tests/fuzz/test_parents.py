"""Saved parents that are broken or mean harm: refused with one error, nothing read elsewhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import folder_bytes, save_parent

from slimfuse.errors import UserError
from slimfuse.families import ViT
from slimfuse.pipeline.origins import INDEX, WEIGHTS, find_parent, weights_digest
from slimfuse.tasks import TASKS

HUGE = 2**62


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_parent(tmp_path_factory.mktemp("fuzz") / "parent")


@pytest.fixture
def parent(whole: Path, tmp_path: Path) -> Path:
    """A saved parent that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "home" / "parent"))


def opened(folder: Path) -> None:
    """Do what `prepare` does with a saved parent."""
    family = ViT()
    home = find_parent("a", str(folder), None, folder.parent, TASKS["image-classification"])
    family.load_config(str(home))
    family.load(home)
    weights_digest(home)


def refused(folder: Path) -> str:
    before = folder_bytes(folder.parent)
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert folder_bytes(folder.parent) == before, "nothing was written"
    text = str(caught.value)
    assert caught.value.exit_code == 2 and len(text) < 4000 and "Traceback" not in text
    return text


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def rewrite(folder: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    """Change the header of a weights' file at one weight, and keep its data."""
    header, data = header_of(folder / WEIGHTS)
    change(header, "classifier.bias")
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


HEADERS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "overlapping offsets": lambda h, n: h[n].update(data_offsets=[20, 60]),
    "offsets behind the end": lambda h, n: h[n].update(data_offsets=[HUGE, HUGE + 40]),
    "offsets turned round": lambda h, n: h[n].update(data_offsets=h[n]["data_offsets"][::-1]),
    "negative offsets": lambda h, n: h[n].update(data_offsets=[-40, 0]),
    "wrong dtype": lambda h, n: h[n].update(dtype="F64"),
    "unknown dtype": lambda h, n: h[n].update(dtype="F7"),
    "negative shape": lambda h, n: h[n].update(shape=[-10]),
    "huge shape": lambda h, n: h[n].update(shape=[HUGE, HUGE]),
    "other shape": lambda h, n: h[n].update(shape=[2, 5]),
    "shape of words": lambda h, n: h[n].update(shape=["ten"]),
    "no shape": lambda h, n: h[n].pop("shape"),
    "a list for a weight": lambda h, n: h.update({n: []}),
    "a weight more": lambda h, n: h.update({"../../x": h[n]}),
    "a weight less": lambda h, n: h.pop(n) and None,
    "a number as metadata": lambda h, _: h.update(__metadata__=3),
    "an endless name": lambda h, n: h.update({"x" * 100_000: h.pop(n)}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_header_is_refused(parent: Path, case: str) -> None:
    rewrite(parent, HEADERS[case])
    assert str(parent) in refused(parent)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\0" * 7, struct.pack("<Q", 0), struct.pack("<Q", HUGE) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 4) + b"null", struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 20_000) + b"[" * 20_000, b"PK\3\4" + b"\0" * 60,
        b"\x80\x04\x95cos\nsystem\n.",
    ],
    ids=["empty", "short", "zero", "huge", "largest", "json", "null", "none", "deep", "zip",
         "pickle"],
)  # fmt: skip
def test_what_is_no_safetensors_is_refused(parent: Path, raw: bytes) -> None:
    (parent / WEIGHTS).write_bytes(raw)
    refused(parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(parent: Path, value: float) -> None:
    weights = load_file(parent / WEIGHTS)
    weights["classifier.bias"][3] = value
    save_file(weights, parent / WEIGHTS, {"format": "pt"})
    assert "classifier.bias" in refused(parent)


@pytest.mark.parametrize("seed", range(6))
def test_flipped_and_lost_bytes_are_refused_or_harmless(parent: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = parent / WEIGHTS
    raw = bytearray(file.read_bytes())
    start = struct.unpack("<Q", raw[:8])[0] + 8
    for _ in range(chance.choice((1, 3, 20))):
        raw[chance.randrange(start)] = chance.randrange(256)
    if seed % 3 == 0:
        del raw[chance.randrange(len(raw)) :]
    file.write_bytes(raw)
    try:
        opened(parent)
    except UserError as error:
        assert len(str(error)) < 4000


def sharded(folder: Path, names: dict[str, str]) -> None:
    """Put the weights into one shard with an index that names these files; names: by weight."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    index = {name: names.get(name, "model-1.safetensors") for name in weights}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_shards_are_read(parent: Path) -> None:
    sharded(parent, {})
    opened(parent)


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "gone.safetensors", "", "..",
     "model-1.bin", "x\0.safetensors", "a" * 300 + ".safetensors", "C:\\x.safetensors", 7, None,
     ["model-1.safetensors"]],
    ids=range(13),
)  # fmt: skip
def test_an_index_names_files_beside_it_only(parent: Path, name: Any) -> None:
    shutil.copyfile(parent / WEIGHTS, parent.parent / "other.safetensors")
    sharded(parent, {"classifier.bias": name})
    refused(parent)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_that_is_none_is_refused(parent: Path, text: str) -> None:
    (parent / WEIGHTS).unlink()
    (parent / INDEX).write_text(text)
    refused(parent)


def test_a_link_to_nothing_and_one_in_a_circle_are_refused(parent: Path) -> None:
    (parent / WEIGHTS).unlink()
    (parent / WEIGHTS).symlink_to("gone.safetensors")
    refused(parent)
    (parent / WEIGHTS).unlink()
    (parent / WEIGHTS).symlink_to(WEIGHTS)
    refused(parent)


def test_a_linked_shard_is_the_users_will(parent: Path) -> None:
    # the hub's cache is links to blobs elsewhere; they are only read
    kept = parent.parent / "blob"
    (parent / WEIGHTS).rename(kept)
    (parent / WEIGHTS).symlink_to(os.path.relpath(kept, parent))
    opened(parent)


CONFIGS: dict[str, Any] = {
    "null": None, "list": [], "text": "vit", "number": 7, "empty": {},
    "no type": {"model_type": None}, "list type": {"model_type": ["vit"]},
    "mapping type": {"model_type": {"a": 1}}, "code": {"auto_map": {"AutoModel": "evil.Model"}},
    "word size": {"hidden_size": "wide"}, "negative size": {"hidden_size": -16},
    "no size": {"hidden_size": 0}, "null size": {"hidden_size": None},
    "huge size": {"hidden_size": HUGE}, "deep": {"num_hidden_layers": 10**9},
    "half size": {"hidden_size": 16.5}, "heads": {"num_attention_heads": 3},
    "no heads": {"num_attention_heads": 0}, "act": {"hidden_act": "../x"},
    "act list": {"hidden_act": [1]}, "labels": {"id2label": 3}, "labels list": {"id2label": ["a"]},
    "patch": {"patch_size": 0}, "odd patch": {"patch_size": "4"}, "image": {"image_size": -8},
    "channels": {"num_channels": HUGE},
    "eps": {"layer_norm_eps": "small"}, "dropout": {"hidden_dropout_prob": 7},
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_nonsense_is_refused(parent: Path, case: str) -> None:
    value = CONFIGS[case]
    file = parent / "config.json"
    if isinstance(value, dict) and value:
        value = {**json.loads(file.read_text()), **value}
    file.write_text(json.dumps(value))
    if case == "code":
        opened(parent)  # which is never looked for
        return
    refused(parent)


def test_the_whole_parent_opens(parent: Path) -> None:
    opened(parent)
    assert torch.isfinite(load_file(parent / WEIGHTS)["classifier.bias"]).all()
