"""Saved parents that the tests of `finetune` teach from."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_text
from tiny_run import save_parent


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    save_parent(folder / "wide", seed=1)
    save_parent(folder / "slim", seed=2, hidden_size=12, num_hidden_layers=3)
    tiny_text.save_texts(folder / "data", (60, 40))
    tiny_text.save_parent(folder / "texts")
    return folder
