"""Verbs that write files: quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from slimfuse_export.folder import INT8, MODEL
from slimfuse_export.quantize import quantization_plan, quantize_dynamic_int8


def add(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(quantize)


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
