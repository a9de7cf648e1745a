"""Recipes that can't be run: one clear error, exit code 2, nothing that looks finished."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from errors.saying import Words, says, two
from tiny_run import TRAIN, recipe, save_parent, write_recipe


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (recipe(finetune={"epochz": 1}), ("recipe.yaml:", "finetune.epochz", "'epochs'?")),
        (recipe(target={"hidden_size": 0}), ("target.hidden_size", "got: 0", "allowed:")),
        (
            recipe(target={"hidden_size": 9}),
            (
                "where:   ", "recipe.yaml:", ": target.hidden_size",
                "got:     hidden_size 9", "allowed: hidden_size 8 or 10",
            ),
        ),
        (
            recipe(target={"hidden_size": 18, "intermediate_size": 8}),
            ("target.hidden_size", "got:     18", "allowed: 1 … 16"),
        ),
        (
            recipe(target={"num_hidden_layers": 3}),
            ("target.num_hidden_layers", "got:     3", "allowed: 1 … 2"),
        ),
        (
            recipe(parents=[{"name": "a", "from": "../gone"}]),
            ("parent 'a' does not exist", "parents.a.from", "../gone", "next:"),
        ),
        (
            recipe(data={"source": "imagefolder", "path": "nowhere"}),
            ("the image folder does not exist", "data.path", "nowhere"),
        ),
        (
            recipe(data={"limit": {"train": 1}}),
            ("fewer training samples than shards", "parents.a.train.shard", "got:     1/2"),
        ),
    ],
    ids=["misspelt", "bounds", "illegal", "wider", "depth", "gone", "data", "shards"],
)  # fmt: skip
def test_recipe_that_cannot_be_run(
    fails: Callable[..., str], content: dict[str, Any], words: Words
) -> None:
    says(fails(content), words)


def test_recipe_file_that_is_none(fails: Callable[..., str], tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    says(fails(tmp_path / "gone.yaml"), ("can't be read: No such file", "gone.yaml", "next:"))
    says(fails(tmp_path), ("Is a directory", str(tmp_path)))
    says(fails(binary), ("binary.yaml",))


@pytest.mark.parametrize(
    "override", ["nonsense", "=", "finetune.epochs=", "finetune.epochs=[", "a..b=1", "parents.7=1"]
)
def test_override_that_is_none(fails: Callable[..., str], override: str) -> None:
    says(fails(recipe(), "--set", override), (f"--set {override}",))


def test_hub_id_while_offline(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = fails(recipe(parents=[{"name": "a", "from": "nobody/no-such-model"}]))
    says(text, ("neither a folder here nor to be had from the hub", "nobody/no-such-model", "next"))


@pytest.mark.parametrize(
    ("key", "value", "place", "words"),
    [
        ("target.hidden_size", 9, "target.hidden_size", "must be a multiple"),
        ("parents.1.from", "gone/x/y", "parents.b.from", "does not exist"),
        ("parents.1.from", "models/gone", "parents.b.from", "models is here, but gone is not"),
        ("parents.0.train.config.patch_size", 3, "parents.a.train.config.patch_size", "divide"),
        ("parents.0.train.shard", "1/9999", "parents.a.train.shard", "fewer training samples"),
        ("parents.1.revision", "main", "parents.b.revision", "only with a hub id"),
    ],
)
def test_a_late_error_tells_the_line_of_its_key(
    fails: Callable[..., str], tmp_path: Path, key: str, value: Any, place: str, words: str
) -> None:
    save_parent(tmp_path / "models" / "slim")
    parents = [{"name": "a", "train": {**TRAIN, "shard": "1/2"}},
               {"name": "b", "from": "models/slim", "revision": None}]  # fmt: skip
    content = recipe(parents=copy.deepcopy(parents))
    *way, last = (int(k) if k.isdigit() else k for k in key.split("."))
    spot: Any = content
    for step in way:
        spot = spot[step]
    spot[last] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content, indent=1))  # YAML too, one key a line
    wanted = f'"{last}": {json.dumps(value)}'
    line = next(n for n, text in enumerate(path.read_text().split("\n"), 1) if wanted in text)
    says(fails(path), (words, f"recipe.yaml:{line}: {place}"))
    text = fails(write_recipe(path, content), "--set", f"{key}={json.dumps(value)}")
    says(text, (f"--set {key}={json.dumps(value)}: {place}",))


def test_labels_that_are_not_the_datas_tell_the_line(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    save_parent(tmp_path / "slim", labels=["0", "1", "two"])
    says(
        fails(recipe(parents=[{"name": "a.b", "from": "slim"}]), "--set", "parents.0.weight=2"),
        ("labels are not the data set's", "recipe.yaml:", ": parents.a.b"),
    )


def test_subclone_of_a_parent_with_too_few_units(fails: Callable[..., str], tmp_path: Path) -> None:
    save_parent(tmp_path / "slim", intermediate_size=8)
    save_parent(tmp_path / "other", hidden_size=24, intermediate_size=32)
    content = {**two(), "target": {"hidden_size": 8, "intermediate_size": 12}}
    content["fuse"] = {"parents": ["a"]}  # b alone has as many
    selected = {"fuse": {"parents": ["a"], "method": "select"}}
    for key, change in (("baselines", {"baselines": ["subclone"]}), ("fuse.method", selected)):
        text = fails({**content, **change})
        says(text, ("copies units of the widest parent", "a has too few", "recipe.yaml:",
                    f": {key}", "mlp.0: 8 units", "12", "next:"))  # fmt: skip
