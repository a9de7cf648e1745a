"""Prove that a finished folder opens in stock tools, in a process without slimfuse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from slimfuse.errors import CheckFailed, UserError
from slimfuse.stock.process import clean_process, one_process
from slimfuse.stock.scripts import SCRIPTS

TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4  # other kernels than those that made the logits

PREPROCESSORS = ("preprocessor_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Verified:
    """What the clean process saw; `gap` is the largest difference of answers, relative."""

    model_class: str
    processor_class: str
    parameters: int
    gap: float


def verify(folder: Path, *, threads: int = 1) -> Verified:
    """Open `folder` with transformers' Auto classes, or timm, where slimfuse can't be imported.

    A plain net has no stock class: there onnxruntime opens its ONNX file. Raises UserError when
    the folder is not a finished one, CheckFailed when a weight is missing or unexpected or the
    answers differ from the run's by more than 1e-5 (ONNX: 1e-4) of their size.
    """
    needed = ("config.json", "model.safetensors", "onnx/samples.npz")
    missing = [name for name in needed if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in PREPROCESSORS):
        missing.append(" or ".join(PREPROCESSORS))
    if missing:
        raise UserError(
            "this is not a finished model folder",
            where=str(folder),
            got=f"no {', no '.join(missing)}",
            hint="give the `model` folder of a run that has finished",
        )
    kind = _kind(folder)
    plain, script = kind == "plain", SCRIPTS[kind]
    tolerance = ONNX_TOLERANCE if plain else TOLERANCE
    with clean_process() as process:
        result = process.ask(script, folder, threads)
    if "error" in result:
        what = "onnxruntime" if plain else "stock classes"
        raise CheckFailed(f"{what} can't open the folder", where=str(folder), got=result["error"])
    gap = result["gap"] / (result["scale"] or 1.0)
    if result["problems"]:
        raise CheckFailed(
            "weights don't fit the stock class",
            where=str(folder),
            got="; ".join(f"{what}: {', '.join(n[:5])}" for what, n in result["problems"].items()),
        )
    if not result["samples"]:
        raise CheckFailed(
            "the folder holds no answers of its run to compare with",
            where=str(folder / "onnx/samples.npz"),
        )
    if not gap <= tolerance:
        raise CheckFailed(
            f"{'onnxruntime' if plain else 'the stock class'} gives other answers than the run did",
            where=str(folder),
            got=f"{gap:.2e} relative",
            allowed=f"{tolerance:.0e}",
        )
    return Verified(result["class"], result["processor"], result["parameters"], gap)


def _kind(folder: Path) -> str:
    """Tell whose class a folder's config names: transformers' (stock), timm's or none (plain)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return "stock"
    if not isinstance(config, dict) or "architecture" not in config or "model_type" in config:
        return "stock"
    return "timm" if "pretrained_cfg" in config else "plain"


__all__ = ["Verified", "one_process", "verify"]
