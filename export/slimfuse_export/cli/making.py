"""Verbs that write files: optimize, quantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from slimfuse_export._files import replacing
from slimfuse_export.cli import _show
from slimfuse_export.cli._words import Dims, numbers, single_sizes
from slimfuse_export.folder import INT8, MODEL
from slimfuse_export.optimization import OPTIMIZED, optimize_folder
from slimfuse_export.quantize import quantization_plan, quantize_dynamic_int8


def add(app: typer.Typer) -> None:
    """Add this module's verbs."""
    for verb in (optimize, quantize):
        app.command()(verb)


def optimize(
    folder: Annotated[Path, typer.Argument(help="A folder with onnx/model.onnx.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Put a portable winner in onnx/model.onnx's place.")
    ] = False,
    dim: Dims = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads, as 1,2.")] = "1",
    batch: Annotated[str, typer.Option(help="Batch sizes, as 1,8.")] = "1",
    min_seconds: Annotated[float, typer.Option(help="Timed seconds of each graph.")] = 3.0,
    atol: Annotated[float, typer.Option(help="Absolute tolerance of float outputs.")] = 1e-4,
    rtol: Annotated[float, typer.Option(help="Relative tolerance of float outputs.")] = 1e-4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    """Try other graphs of the model, and keep the fastest where it surely wins on this machine."""
    with _show.progress(Console(stderr=True)) as tell:
        done = optimize_folder(
            folder, replace=replace, dims=single_sizes(dim), threads=numbers("--threads", threads),
            batch=numbers("--batch", batch), min_seconds=min_seconds, atol=atol, rtol=rtol,
            progress=tell,
        )  # fmt: skip
    console = Console()
    _show.show_trials(console, done.trials)
    if done.winner is None:
        line = f"{MODEL.as_posix()} stays as it is: nothing surely beats it here"
    else:
        at = OPTIMIZED if done.written == folder / OPTIMIZED else MODEL
        line = f"{at.as_posix()}: {done.winner}"
    console.print(Text(line), soft_wrap=True)
    if json_file is not None:
        with replacing(json_file) as part:
            part.write_text(json.dumps(done.as_dict(), indent=2) + "\n")


def quantize(
    folder: Annotated[Path, typer.Argument(help="A folder with onnx/model.onnx.")],
) -> None:
    """Write onnx/model_quantized.onnx: INT8 weights, dynamically quantised activations."""
    plan = quantization_plan()
    console = Console()
    if plan.mode == "float32":
        console.print(Text(f"this CPU may run INT8 slower than float: {plan.reason}", "yellow"))
    done = quantize_dynamic_int8(folder / MODEL, folder / INT8, reduce_range=plan.reduce_range)
    line = (
        f"{INT8.as_posix()}: {done.products} products in INT8, "
        f"{done.source_bytes:,} → {done.bytes:,} bytes; {plan.reason}"
    )
    console.print(Text(line), soft_wrap=True)
