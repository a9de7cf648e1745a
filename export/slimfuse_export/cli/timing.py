"""The verb that times: bench."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from slimfuse_export._files import replacing
from slimfuse_export.bench import bench as run_bench
from slimfuse_export.bench import footprints
from slimfuse_export.cli import _show
from slimfuse_export.cli._words import (
    AsJson,
    Dims,
    give,
    model_files,
    name_models,
    numbers,
    screen,
    sizes,
)
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.latency import BenchResult, Ratio
from slimfuse_export.measuring.agreement import WITHIN, compare_benches
from slimfuse_export.measuring.footprint import Footprint
from slimfuse_export.measuring.plot import plot_bench


def add(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(bench)


def bench(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Model folders or .onnx files.")
    ] = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads, as 1,2.")] = "1",
    batch: Annotated[str, typer.Option(help="Batch sizes, as 1,8.")] = "1",
    dim: Dims = None,
    warmup: Annotated[int, typer.Option(help="Untimed calls of each model.")] = 10,
    min_seconds: Annotated[float, typer.Option(help="Timed seconds of each model.")] = 3.0,
    min_runs: Annotated[int, typer.Option(help="Timed calls of each model.")] = 100,
    pin: Annotated[bool, typer.Option(help="Keep calls on as many cores as threads.")] = True,
    memory: Annotated[bool, typer.Option(help="Also measure load time and memory.")] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 where the machine is too noisy.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of inputs, order and intervals.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw an SVG here.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two files with what --json printed: do their ratios agree to 10 %?"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time models against each other, interleaved; the first one is the base."""
    if plot is not None and not plot.parent.is_dir():
        raise ExportError("the folder to write into does not exist", where=plot.parent)
    if compare is not None:
        _compare(*compare, as_json)
        return
    models = name_models([model for path in paths or () for model in model_files(path)])
    grid: dict[str, Any] = {
        "dims": sizes(dim), "threads": numbers("--threads", threads),
        "batch": numbers("--batch", batch), "seed": seed,
    }  # fmt: skip
    with _show.progress(Console(stderr=True)) as tell:
        result = run_bench(
            models, **grid, warmup=warmup, min_seconds=min_seconds, min_runs=min_runs,
            control=True, pin=pin, progress=tell,
        )  # fmt: skip
    used = footprints(models, **grid) if memory else {}
    ratios = result.ratios(next(iter(models)), seed=seed)
    console = screen(as_json)
    _show.show_bench(console, result, ratios)
    _show.show_footprints(console, used)
    if plot is not None:
        with replacing(plot) as part:
            part.write_text(plot_bench(result), encoding="utf-8")
    give(_report(result, ratios, used), as_json)
    if strict and (noisy := [r for r in ratios if r.noisy]):
        raise CheckFailed(
            "the machine was too noisy for a verdict", got=noisy[0].noise,
            hint="stop what else runs, or ask for more --min-seconds",
        )  # fmt: skip


def _report(
    result: BenchResult, ratios: list[Ratio], used: dict[tuple[str, int, str], Footprint]
) -> dict[str, Any]:
    return {
        **result.as_dict(),
        "ratios": [{**asdict(ratio), "verdict": ratio.verdict} for ratio in ratios],
        "footprints": [
            {"name": name, "batch": batch, "dims": dims, **asdict(one)}
            for (name, batch, dims), one in used.items()
        ],
    }


def _compare(first: Path, second: Path, as_json: bool) -> None:
    found = compare_benches(first, second)
    _show.show_agreements(screen(as_json), found)
    give({"agreements": [asdict(one) | {"agrees": one.agrees} for one in found]}, as_json)
    if apart := [one for one in found if not one.agrees]:
        worst = max(apart, key=lambda one: one.difference)
        raise CheckFailed(
            f"{len(apart)} of {len(found)} ratios do not come again", where=first,
            got=f"{worst.other} : {worst.base} {worst.first:.3f} and {worst.second:.3f}",
            allowed=f"within {WITHIN:.0%}",
        )  # fmt: skip
