"""Fixtures of the starts' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starts.looking import HALF, TWINS
from tiny_run import recipe, save_parent, write_recipe

from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random parents: `slim` and `twin` of one shape, `wide`, `deep`, and half-wide `anchor`."""
    root = tmp_path_factory.mktemp("zoo")
    save_parent(root / "slim")
    save_parent(root / "twin", seed=1)
    save_parent(root / "wide", seed=2, hidden_size=24, num_attention_heads=4, intermediate_size=32)
    save_parent(root / "deep", seed=3, num_hidden_layers=4)
    save_parent(root / "anchor", seed=4, hidden_size=8, intermediate_size=12)
    save_parent(root / "odd", seed=5, labels=[str(i) for i in reversed(range(10))])
    save_parent(root / "low", seed=6, labels=[str(i) for i in range(5)])
    save_parent(root / "high", seed=7, labels=[str(i) for i in range(5, 10)])
    return root


@pytest.fixture
def stages(zoo: Path, tmp_path: Path) -> Any:
    """Return a function from a recipe's changes to its stages."""

    def make(fuse: dict[str, Any] | None = None, target: Any = HALF, **changes: Any) -> Stages:
        content = recipe(**{"parents": TWINS, **changes})
        content |= {"fuse": fuse or {}, "target": target}
        path = write_recipe(zoo / f"{tmp_path.name}.yaml", content)
        return Stages(prepare(load_recipe(path), path), Store(tmp_path))

    return make
