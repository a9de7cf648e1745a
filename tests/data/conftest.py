"""An image folder, and a cache of its own for the `datasets` library."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

COUNTS = {"train": {"cat": 5, "dog": 3, "emu": 2}, "validation": {"cat": 2, "dog": 1, "emu": 1}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what `datasets` prepares inside the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def write_folder(root: Path) -> Path:
    random = np.random.default_rng(0)
    for split, classes in COUNTS.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (7, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: 10 images of 3 classes under `train`, 4 under `validation`."""
    return write_folder(tmp_path / "zoo")
