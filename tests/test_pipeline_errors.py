"""What a user can get wrong: one clear error, exit code 2, nothing that looks finished."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_run import TRAIN, recipe, save_parent, write_recipe

from slimfuse import cli
from slimfuse.errors import StorageError
from slimfuse.finetune import checkpoint, loop
from slimfuse.pipeline import compress
from slimfuse.pipeline import run as story
from slimfuse.store import Store

Words = tuple[str, ...]
Case = tuple[dict[str, Any], Words]


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `slimfuse compress` and return its one error; it must leave nothing behind."""

    def run(content: dict[str, Any] | Path, *more: str, untouched: bool = True) -> str:
        path = (
            content
            if isinstance(content, Path)
            else write_recipe(tmp_path / "recipe.yaml", content)
        )
        out = tmp_path / "run"
        monkeypatch.setattr(
            sys, "argv", ["slimfuse", "compress", str(path), "--out", str(out), *more]
        )
        with pytest.raises(SystemExit) as done:
            cli.main()
        shown = capsys.readouterr()
        text = shown.err[shown.err.find("error:") :]
        assert done.value.code == 2, shown.err
        assert shown.err.count("error:") == 1 and "Traceback" not in shown.err
        assert shown.out == ""
        assert not [n for n in ("model", "report.json", "report.html") if (out / n).exists()]
        if untouched:
            assert not out.is_dir(), "the error was known before any work"
        return text

    return run


def says(text: str, words: Words) -> None:
    """Check that an error holds every word."""
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in:\n{text}"


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


# -- parents that don't fit -------------------------------------------------------------------


def two(first: str = "slim", second: str = "other") -> dict[str, Any]:
    """Return a recipe that fuses two saved parents."""
    return recipe(parents=[{"name": "a", "from": first}, {"name": "b", "from": second}])


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
    "pickle": (pickled, ("lacks model.safetensors", "pytorch_model.bin is not read", "next:")),
    "config": (lambda f: (f / "config.json").write_text("{"), ("can't be opened", "config.json")),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_parent(fails: Callable[..., str], slim: Path, case: str) -> None:
    spoil, words = SPOILED[case]
    spoil(slim)
    says(fails(recipe(parents=[{"name": "a", "from": "slim"}])), words)


# -- the run folder ---------------------------------------------------------------------------


def test_run_folder_that_is_held_by_another_run(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        text = fails(recipe(), untouched=False)
    says(text, ("another slimfuse process", str(tmp_path / "run"), "--out"))


def test_run_folder_that_is_a_file(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    says(fails(recipe()), ("can't be written", str(tmp_path / "run"), "got:", "next:"))


@pytest.mark.parametrize("name", ["model", "report.json", "report.html"])
def test_a_folder_of_someone_else_is_left_alone(
    tiny_recipe: Path, tmp_path: Path, name: str
) -> None:
    root = tmp_path / "mine"
    file = root / name / "weights.bin" if name == "model" else root / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    for own in ("model.old", "stages"):
        (root / own).mkdir()
    before = sorted(root.rglob("*"))
    with pytest.raises(StorageError, match="not a run folder") as error:
        compress(tiny_recipe, out=root)
    assert error.value.got == name and error.value.where == str(root)
    assert file.read_text() == "precious" and sorted(root.rglob("*")) == before


def test_run_folder_below_a_file(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    text = fails(recipe(), "--out", str(tmp_path / "file" / "run"))
    says(text, ("can't be written", "Not a directory", "--out"))


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small disk, seen by this process alone; it goes when the process goes."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root's rights")
    handle = os.open(folder, os.O_RDONLY)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    try:
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def test_disk_that_is_too_small_is_known_before_any_work(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "size=256k") as disk:
        text = fails(recipe(), "--out", str(disk / "run"))
        assert list(disk.iterdir()) == []
    says(text, ("the disk is too full", str(disk / "run"), "MiB free", "allowed: about", "next:"))


def test_disk_that_fills_up_during_the_run(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "check_disk", lambda *_: None)
    with small_disk(tmp_path / "disk", "size=256k") as disk:
        text = fails(recipe(), "--out", str(disk / "run"), untouched=False)
        says(text, ("the disk is full", str(disk / "run"), "run the same command again"))
        kept = {f.name for f in (disk / "run").iterdir()}
        assert "stages" in kept and not kept & {"model", "report.json", "report.html"}
        assert list((disk / "run" / "stages").glob("parent-a-*[0-9a-f]")), "finished, so kept"


def test_read_only_disk(fails: Callable[..., str], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "ro,size=64m") as disk:
        text = fails(recipe(), "--out", str(disk / "run"))
    says(text, ("can't be written", "Read-only file system", "next:"))


def test_disk_that_is_full_when_a_checkpoint_is_written(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        # what safetensors raises: no OSError
        raise SafetensorError('IoError(Os { code: 28, message: "No space left on device" })')

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        compress(tiny_recipe, out=tmp_path / "run")


def test_unreadable_file_elsewhere_is_not_blamed_on_the_run_folder(tmp_path: Path) -> None:
    def build(_folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/file")

    with pytest.raises(PermissionError):
        Store(tmp_path).stage("x", {}, build)
