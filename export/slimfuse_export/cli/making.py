"""Verbs that write files: optimize, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.text import Text

from slimfuse_export.cli import _show
from slimfuse_export.cli._words import AsJson, Dims, give, numbers, screen, single_sizes
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.folder import INT8, MODEL, OPTIMIZED
from slimfuse_export.optimization import optimize_folder
from slimfuse_export.quantization import (
    MAX_DROP,
    Choice,
    Quantized,
    disagreement,
    lost_accuracy,
    quantization_plan,
    quantize_model,
)
from slimfuse_export.references import distinct_rows, load_rows, reference_cases, rows_of


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
    as_json: AsJson = False,
) -> None:
    """Try other graphs of the model, and keep the fastest where it surely wins on this machine."""
    with _show.progress(Console(stderr=True)) as tell:
        done = optimize_folder(
            folder, replace=replace, dims=single_sizes(dim), threads=numbers("--threads", threads),
            batch=numbers("--batch", batch), min_seconds=min_seconds, atol=atol, rtol=rtol,
            progress=tell,
        )  # fmt: skip
    console = screen(as_json)
    _show.show_trials(console, done.trials)
    if done.winner is None:
        line = f"{MODEL.as_posix()} stays as it is: nothing surely beats it here"
    else:
        at = OPTIMIZED if done.written == folder / OPTIMIZED else MODEL
        line = f"{at.as_posix()}: {done.winner}"
    console.print(Text(line), soft_wrap=True)
    give(done.as_dict(), as_json)


def quantize(
    folder: Annotated[Path, typer.Argument(help="A folder with onnx/model.onnx.")],
    mode: Annotated[str, typer.Option(help="auto, dynamic, static or int4.")] = "auto",
    max_drop: Annotated[
        float, typer.Option(help="Largest share of answers that may change, or loss of accuracy.")
    ] = MAX_DROP,
    calibration: Annotated[
        Path | None, typer.Option(help="An .npz of inputs by name, for static ranges.")
    ] = None,
    labelled: Annotated[
        Path | None, typer.Option(help="An .npz of inputs and labels: accuracy decides.")
    ] = None,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="A product's node or weight that stays float.")
    ] = None,
    dim: Dims = None,
    min_seconds: Annotated[float, typer.Option(help="Timed seconds of each kind.")] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Write onnx/model_quantized.onnx where it is good enough: INT8, or 4-bit weights."""
    if not 0 <= max_drop <= 1:
        raise ExportError("not a share", where="--max-drop", got=max_drop, allowed="0 to 1")
    plan, console = quantization_plan(), screen(as_json)
    if plan.mode == "float32":
        console.print(Text(f"this CPU may run INT8 slower than float: {plan.reason}", "yellow"))
    src = folder / MODEL
    cases = reference_cases(folder, dims=single_sizes(dim))
    inputs = load_rows(calibration)[0] if calibration is not None else distinct_rows(cases)
    rows, labels = (
        load_rows(labelled) if labelled is not None else ([c.inputs for c in cases], None)
    )
    if labelled is not None and labels is None:
        raise ExportError("the file has no array of labels", where=labelled, allowed="labels")
    loss = disagreement(src, rows) if labels is None else lost_accuracy(src, rows, labels)
    with _show.progress(Console(stderr=True)) as tell:
        done = quantize_model(
            src, folder / INT8, loss=loss, inputs=inputs, mode=cast("Choice", mode),
            max_drop=max_drop, keep_float=keep_float or (), make_inputs=rows_of(cases),
            plan=plan, min_seconds=min_seconds, progress=tell,
        )  # fmt: skip
    count = sum(len(next(iter(one.values()))) for one in rows)
    what = "accuracy lost" if labels is not None else "answers changed"
    _show.show_attempts(console, done, f"{what} on {count} rows")
    give(done.as_dict(), as_json)
    if done.made is None:
        raise CheckFailed(
            "no quantised file is good enough, so none was written", where=folder,
            got=f"at best {min(a.loss for a in done.attempts):.1%} of {what}",
            allowed=f"{max_drop:.1%}",
        )  # fmt: skip
    console.print(Text(f"{INT8.as_posix()}: {made_line(done.made)}"), soft_wrap=True)


def made_line(made: Quantized) -> str:
    """Return what a quantised file is, in a line."""
    kind = {"dynamic": "dynamic INT8", "static": "static INT8", "int4": "4 bits"}[made.mode]
    kept = f" ({len(made.kept_float)} stay float)" if made.kept_float else ""
    sizes = f"{made.source_bytes:,} → {made.bytes:,} bytes"
    return f"{made.products} products in {kind}{kept}, {sizes}"
