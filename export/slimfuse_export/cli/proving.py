"""Verbs that look: check, inspect, doctor."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import slimfuse_export
from slimfuse_export.cli import _show
from slimfuse_export.cli._words import AsJson, Dims, give, screen, single_sizes
from slimfuse_export.environment import environment
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.folder import check_folder
from slimfuse_export.inspecting import inspect_folder
from slimfuse_export.quantization import int8_saturates, quantization_plan


def add(app: typer.Typer) -> None:
    """Add this module's verbs."""
    for verb in (check, inspect, doctor):
        app.command()(verb)


def check(
    folder: Annotated[Path, typer.Argument(help="A finished model folder.")],
    dim: Dims = None,
    atol: Annotated[float, typer.Option(help="Absolute tolerance of float outputs.")] = 1e-3,
    rtol: Annotated[float, typer.Option(help="Relative tolerance of float outputs.")] = 1e-3,
    as_json: AsJson = False,
) -> None:
    """Open a folder from its files alone and check what deployment relies on."""
    results = check_folder(folder, atol=atol, rtol=rtol, dims=single_sizes(dim))
    _show.show_checks(screen(as_json), results)
    passed = all(result.passed for result in results)
    give({"passed": passed, "checks": [asdict(result) for result in results]}, as_json)
    if failed := [result.name for result in results if not result.passed]:
        raise CheckFailed(
            f"{len(failed)} of {len(results)} checks failed", where=folder, got=", ".join(failed)
        )


def inspect(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    as_json: AsJson = False,
) -> None:
    """Say what is in a folder's ONNX files, what they need and what they were made of."""
    facts = inspect_folder(folder)
    if not facts:
        raise ExportError("the folder holds no model", where=folder, allowed="onnx/*.onnx")
    console = screen(as_json)
    for name, one in facts.items():
        _show.show_facts(console, name, one)
    give({name: one.as_dict() for name, one in facts.items()}, as_json)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine is, what INT8 mode suits it, and prove that onnxruntime runs."""
    plan = quantization_plan()
    with tempfile.TemporaryDirectory() as folder:
        saturates = int8_saturates(folder)
    rows = {
        "slimfuse-export": slimfuse_export.__version__,
        **environment(),
        "expected to be fast": f"{plan.mode}: {plan.reason}",
        "8-bit products": "saturate (measured)" if saturates else "exact (measured)",
    }
    console = screen(as_json)
    for name, value in rows.items():
        console.print(Text(f"{name:20} {'none' if value is None else value}"), soft_wrap=True)
    give(rows, as_json)
    if saturates and not plan.reduce_range:
        raise CheckFailed(
            "8-bit products saturate here, and the CPU's flags don't say so",
            hint="quantise with reduce_range=True",
        )
