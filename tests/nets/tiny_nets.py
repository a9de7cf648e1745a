"""Recipes of plain nets that run in seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run
import torch

from slimfuse.data import load_digits
from slimfuse.nets import new_classifier
from slimfuse.tasks.image_classification import make_processor

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes" / "auto").glob("*.yaml"))
MLP = {"architecture": "mlp", "hidden": [12, 7]}
TRAIN = {"config": MLP, "epochs": 3, "batch_size": 32, "lr": 5e-3}
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "nets",
    "family": "auto",
    "task": "image-classification",
    "data": tiny_run.RECIPE["data"],
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


def save_net(folder: Path, config: Any, *, seed: int = 0) -> Path:
    """Save a random net with its processor."""
    torch.manual_seed(seed)
    new_classifier(config).save_pretrained(folder)
    data = load_digits()
    make_processor(8, data.mean, data.std).save_pretrained(folder)
    return folder
