"""Fixtures of the tests of plain nets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets.tiny_nets import RECIPE, Build, changed
from tiny_run import write_recipe

torch.set_num_threads(1)


@pytest.fixture
def recipe(tmp_path: Path) -> Build:
    """Write a changed recipe and return its path."""
    return lambda **changes: write_recipe(tmp_path / "nets.yaml", changed(**changes))


@pytest.fixture(scope="session")
def net_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipes") / "nets.yaml", RECIPE)
