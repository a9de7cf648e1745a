"""What the benchmarks share: controls as recipes, tables, conditions."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from slimfuse.pipeline import Run, compress
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.run import quiet
from slimfuse.recipe import Recipe, load_recipe
from slimfuse.report import Row

RESULTS = Path(__file__).parent / "results"


def parent_folder(run: Run, name: str) -> Path:
    """Return where a run keeps a parent that it trained."""
    found = [f for f in (run.folder / "stages").glob(f"parent-{name}-*") if f.suffix != ".partial"]
    assert len(found) == 1, f"{name} was trained {len(found)} times in {run.folder}"
    return found[0].resolve()


def random_parent(recipe: Path, seed: int, folder: Path) -> Path:
    """Save a parent of the recipe's shape that was never trained."""
    quiet()
    job = prepare(load_recipe(recipe), recipe)
    torch.manual_seed(seed)
    job.family.build(job.parents[0].config).save_pretrained(folder)  # type: ignore[operator]
    job.processor.save_pretrained(folder)
    return folder.resolve()


def single(recipe: Path, overrides: tuple[str, ...], parent: Path, out: Path) -> Run:
    """Run the recipe with one existing parent in the place of its own."""
    only = f"parents=[{{name: only, from: {json.dumps(str(parent))}}}]"
    more = ("finetune.distill.teachers=[only]", "baselines=[]", "gates=[]")
    return compress(recipe, overrides=(*overrides, only, *more), out=out)


def row(run: Run, name: str) -> Row:
    """Return a row of a run's report."""
    return next(r for r in run.report.rows if r.name == name)


def accuracy(run: Run, name: str) -> float:
    """Return the test accuracy of a row, in per cent."""
    return 100 * row(run, name).metrics["accuracy"].value


def job_of(run: Path, recipe: Path, tests: int) -> Job:
    """Return a job that measures a finished run's child on at most so many test samples.

    The child is its only parent: a recipe's own parents may lie elsewhere.
    """
    overrides = (
        f"data.limit={{test: {tests}}}",
        f"parents=[{{name: only, from: {json.dumps(str((run / 'model').resolve()))}}}]",
        "fuse={method: keep}", "target={}", "finetune={epochs: 0}", "baselines=[]", "gates=[]",
    )  # fmt: skip
    loaded = load_recipe(recipe, overrides)
    assert isinstance(loaded, Recipe)
    return prepare(loaded, recipe)


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    from slimfuse_export import environment

    kept = {k: str(v) for k, v in environment().items() if v is not None}
    return kept | {"python": platform.python_version(), "torch": str(torch.__version__)}


def write(name: str, data: dict[str, Any], markdown: str) -> None:
    """Write results as JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown)
    print(markdown)


def settle(claims: dict[str, bool]) -> None:
    """Print every claim with its verdict; exit with 3 when one doesn't hold."""
    for claim, held in claims.items():
        print(f"{'held  ' if held else 'FAILED'} {claim}")
    if not all(claims.values()):
        raise SystemExit(3)
