"""A recipe that runs in seconds, saved parents, and processes that die where a test says."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from slimfuse.data import load_digits
from slimfuse.families import ViT
from slimfuse.families.base import Shape
from slimfuse.pipeline import package
from slimfuse.pipeline import run as story
from slimfuse.pipeline.deployment import Deployment
from slimfuse.store import Stage, file_digest
from slimfuse.tasks.image_classification import make_processor

torch.set_num_threads(1)

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
}
TRAIN = {"config": SHAPE, "epochs": 2, "batch_size": 32, "lr": 5e-3}
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "family": "vit",
    "task": "image-classification",
    "data": {
        "source": "digits",
        "limit": {"train": 150, "test": 60},
        "calibration": {"samples": 70},
    },
    "parents": [
        {"name": "a", "train": {**TRAIN, "shard": "1/2", "seed": 0}},
        {"name": "b", "train": {**TRAIN, "shard": "2/2", "seed": 1}},
    ],
    "target": {"hidden_size": 0.5, "intermediate_size": 0.5},
    "finetune": {"epochs": 2, "batch_size": 32},
    "export": {"quantize": {"mode": "dynamic"}},
    "bench": {"threads": [1], "batch": [1], "warmup": 1, "min_seconds": 0.02},
    "runtime": {"threads": 1, "precision": "fp32"},
}


def recipe(**changes: Any) -> dict[str, Any]:
    """Return the tiny recipe with top-level keys replaced; mappings are merged."""
    made = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        old = made.get(key)
        made[key] = {**old, **value} if isinstance(old, dict) else value
    return made


def write_recipe(path: Path, content: Mapping[str, Any] = RECIPE) -> Path:
    """Write a recipe as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        YAML(typ="safe").dump(dict(content), file)
    return path


def save_parent(
    folder: Path, *, seed: int = 0, labels: int | Sequence[str] = 10, **sizes: int
) -> Path:
    """Save a random ViT for digits with its processor; labels: names, or so many digits."""
    known = {**SHAPE, "image_size": 8, **sizes}
    config = ViT().new_config(
        Shape(
            known["hidden_size"], known["num_attention_heads"], known["intermediate_size"],
            known["num_hidden_layers"],
        ),
        patch_size=known["patch_size"], image_size=known["image_size"],
        labels=[str(i) for i in range(labels)] if isinstance(labels, int) else labels,
    )  # fmt: skip
    torch.manual_seed(seed)
    ViT().build(config).save_pretrained(folder)  # type: ignore[operator]
    data = load_digits()
    make_processor(known["image_size"], data.mean, data.std).save_pretrained(folder)
    return folder


def unproved(patch: pytest.MonkeyPatch) -> None:
    """Let runs end without their proof in a clean process, which tests/test_verify.py is about."""
    patch.setattr(package, "verify", lambda *_, **__: None)


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Let runs end without their page: to draw it takes seconds, and tests/report is about it."""
    patch.setattr(story, "render_html", lambda _report: "<html>")


def parents_unexported(patch: pytest.MonkeyPatch) -> None:
    """Let the child's ONNX file be timed in its parents' place, whose export takes seconds each.

    So the rows of parents have no latency of their own; the tiny run's are tested with theirs.
    """
    original = Deployment.export

    def export(self: Deployment, name: str, folder: Path, key: str) -> tuple[Stage, float]:
        if name == "child":
            self.__dict__["of_child"] = original(self, name, folder, key)
        found: tuple[Stage, float] = self.__dict__["of_child"]
        return found

    patch.setattr(Deployment, "export", export)


def folder_bytes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder by its path; {} where there is none."""
    return {
        f.relative_to(folder).as_posix(): file_digest(f) for f in folder.rglob("*") if f.is_file()
    }


def events(root: Path, event: str) -> list[str]:
    """Return the stages that have an event in a run's log, in order."""
    lines = (root / "log.jsonl").read_text().splitlines()
    return [entry["stage"] for entry in map(json.loads, lines) if entry["event"] == event]


def in_child(work: Callable[[], object], complaints: Path) -> int:
    """Run `work` in a forked process and return how it ended, as `os.waitpid` says it.

    A fork starts in milliseconds where a new interpreter needs seconds for its imports. An
    exception's traceback goes to the file `complaints`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            with open(os.devnull, "w") as void:  # noqa: PTH123
                os.dup2(void.fileno(), 1)
                os.dup2(void.fileno(), 2)
            work()
            os._exit(0)
        except BaseException:
            complaints.write_text(traceback.format_exc())
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die() -> None:
    """End this process as a power cut would: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def was_killed(status: int) -> bool:
    """Tell whether a process ended by SIGKILL."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
