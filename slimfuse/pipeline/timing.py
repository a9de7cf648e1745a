"""How long a shape takes here, before a model of that shape exists."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from slimfuse_export import bench, resize_batch

from slimfuse.batch import Batch, arrays
from slimfuse.families import Family
from slimfuse.onnx import export_onnx
from slimfuse.pipeline.deployment import MAX_RUNS, MIN_RUNS
from slimfuse.progress import working
from slimfuse.recipe import Recipe
from slimfuse.tasks import TASKS

MIN_SECONDS = 1.0


class Timer:
    """Measured time ratios of shapes to the parent's, through ONNX files of random weights.

    Both are timed in turns (`slimfuse_export.bench`), at the recipe's first thread count and
    batch size; weights don't matter for time. Call it with a config.
    """

    def __init__(self, recipe: Recipe, parent: Any, family: Family, example: Batch) -> None:
        self.recipe, self.family = recipe, family
        self.parent = parent
        self.example = example
        self._folder = tempfile.TemporaryDirectory(prefix="slimfuse-timing-")
        self._base: Path | None = None
        self._count = 0

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def __call__(self, config: Any) -> float:
        """Return the ratio of the medians, this config's over the parent's."""
        with working(f"timing {self.family.shape(config)}"):
            self._base = self._base or self._export(self.parent)
            spec = self.recipe.bench
            threads, batch = spec.threads[0], spec.batch[0]
            result = bench(
                {"parent": self._base, "child": self._export(config)},
                threads=[threads], batch=[batch], warmup=spec.warmup,
                min_seconds=min(spec.min_seconds, MIN_SECONDS), min_runs=MIN_RUNS,
                max_runs=MAX_RUNS, seed=self.recipe.runtime.seed,
                make_inputs=lambda rows: resize_batch(arrays(self.example), rows),
            )  # fmt: skip
        return float(result.ratio("parent", "child", threads=threads, batch=batch).value)

    def _export(self, config: Any) -> Path:
        path = Path(self._folder.name) / f"{self._count}.onnx"
        self._count += 1
        model = self.family.stock_form(self.family.build(config, attention="eager"))
        opset, output = self.recipe.export.opset, TASKS[self.recipe.task].output
        export_onnx(model, self.example, path, opset=opset, output=output)
        return path
