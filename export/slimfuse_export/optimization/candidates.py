"""The graphs that are tried, and why some can't be."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from slimfuse_export.errors import ExportError
from slimfuse_export.graph import load_header, load_model, save_model
from slimfuse_export.metadata import opset_of
from slimfuse_export.sessions import Optimization, first_line, session_options

LAST_OPSET = 24
MAX_SECONDS = 600  # for a tool that runs in a process of its own
HALF_PROVIDERS = ("CUDAExecutionProvider", "DmlExecutionProvider", "CoreMLExecutionProvider")
# A model type of config.json, and what onnxruntime's own fusions call it
_FUSION_TYPES = {
    **dict.fromkeys(("vit", "deit", "dinov2"), "vit"),
    **dict.fromkeys(("bert", "roberta", "distilbert", "electra", "mpnet"), "bert"),
    "gpt2": "gpt2",
    "qwen3": "qwen3",
}
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_WIDTH = ("hidden_size", "n_embd", "dim")
_FUSE = """\
import logging, sys
logging.disable(logging.CRITICAL)
from onnxruntime.transformers.optimizer import optimize_model
source, target, kind, heads, width = sys.argv[1:]
made = optimize_model(source, kind, int(heads), int(width), opt_level=0)
made.save_model_to_file(target)
print(sum(made.get_fused_operator_statistics().values()))
"""
_SLIM = """\
import sys
import onnxslim
onnxslim.slim(sys.argv[1], sys.argv[2])
"""


class NotTried(ExportError):
    """A candidate that can't be made here; says why."""


@dataclass(frozen=True)
class Candidate:
    """A way to another graph of the same model.

    portable: whether the file may travel to another machine. make: writes the graph of a source
    to a target; raises `NotTried`, or ExportError where the tool fails.
    """

    name: str
    portable: bool
    make: Callable[[Path, Path], None]


def candidates(source: Path, config: dict[str, Any]) -> Iterator[Candidate]:
    """Yield what to try. config: the folder's config.json, which says what fusions may apply."""
    for level in ("basic", "extended", "all"):
        yield Candidate(f"onnxruntime {level}", level != "all", partial(_offline, level=level))
    yield Candidate("onnxruntime.transformers fusions", True, partial(_fused, config=config))
    yield Candidate("onnxslim", True, _slimmed)
    opset = opset_of(load_header(source))
    for version in range(max(opset + 1, 21), LAST_OPSET + 1):
        yield Candidate(f"opset {version}", True, partial(_converted, version=version))
    yield Candidate("float16", False, _half)


def _offline(source: Path, target: Path, level: Optimization) -> None:
    options = session_options(threads=1, optimization=level)
    options.optimized_model_filepath = str(target)
    try:
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base but Exception
        raise ExportError("onnxruntime can't write its graph", got=first_line(error)) from error


def _fused(source: Path, target: Path, config: dict[str, Any]) -> None:
    kind = _FUSION_TYPES.get(str(config.get("model_type")))
    if kind is None:
        raise NotTried(f"no fusions are known for model type {config.get('model_type')}")
    heads, width = (next((config[k] for k in keys if k in config), 0) for keys in (_HEADS, _WIDTH))
    # in a process of its own: it puts its folder on sys.path, and it may crash
    said = _apart(_FUSE, str(source), str(target), kind, str(heads), str(width))
    if said.split()[-1:] == ["0"]:
        raise NotTried("none of its patterns occur in this graph")


def _slimmed(source: Path, target: Path) -> None:
    if importlib.util.find_spec("onnxslim") is None:
        raise NotTried("onnxslim is not installed (pip install 'slimfuse-export[slim]')")
    _apart(_SLIM, str(source), str(target))


def _converted(source: Path, target: Path, version: int) -> None:
    try:
        made = onnx.version_converter.convert_version(load_model(source), version)
    except Exception as error:  # ConvertError and RuntimeError share no base
        raise ExportError("onnx can't convert the graph", got=first_line(error)) from error
    save_model(made, target)


def _half(source: Path, target: Path) -> None:
    found = [name for name in ort.get_available_providers() if name in HALF_PROVIDERS]
    if found:
        raise NotTried(f"only the CPU is timed here; float16 may gain with {found[0]}")
    raise NotTried(
        "onnxruntime's CPU provider casts float16 products to float32 and back, "
        "which is slower; no other provider is installed"
    )


def _apart(code: str, *arguments: str) -> str:
    """Run code in a new interpreter and return what it printed."""
    words = [sys.executable, "-c", code, *arguments]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=MAX_SECONDS, env=quiet, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"took more than {MAX_SECONDS} seconds") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExportError("the tool failed", got=last)
    return done.stdout


def model_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json, empty where there is none to be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
