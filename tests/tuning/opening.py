"""A recipe that is taught with all that `finetune` has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_run import recipe, write_recipe

from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store

TAUGHT = {"hidden": 1.0}


def opened(home: Path, root: Path, **changes: Any) -> Stages:
    """Return the stages of two saved ViTs of different widths and depths, nothing made yet."""
    given = {
        "parents": [{"name": n, "from": n} for n in ("wide", "slim")],
        "target": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2},
    }
    path = write_recipe(home / f"{root.name}.yaml", recipe(**(given | changes)))
    root.mkdir(exist_ok=True)
    return Stages(prepare(load_recipe(path), path), Store(root))
