"""Triton's model repository: NAME/config.pbtxt and NAME/1/model.onnx.

The server runs the graph alone: clients send pixels or token ids, prepared as the folder says, and
get logits or states back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from slimfuse_export.deployed.description import describe
from slimfuse_export.errors import ExportError
from slimfuse_export.folder import INT8, MODEL
from slimfuse_export.sessions import open_session

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # what Kubernetes takes, too
_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(double)": "TYPE_FP64",
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(bool)": "TYPE_BOOL",
}
_LABELS = "labels.txt"


def write_triton(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_batch: int = 16,
    wait_ms: float = 2.0,
    int8: bool = False,
) -> Path:
    """Write a model repository for Triton and return the model's folder in it.

    target: the repository, which appears whole; it must not exist or be empty. name: of the model,
    by default the run's. max_batch, wait_ms: of the server's dynamic batching. int8: take the
    quantised file.
    Raises: ExportError for a name that isn't legal, a graph with a fixed batch or odd types.
    """
    folder, target = Path(folder), Path(target)
    source = folder / (INT8 if int8 else MODEL)
    session = open_session(source, threads=1)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    told = describe(folder, [i.name for i in inputs], [o.name for o in outputs])
    name = name or legal_name(told.name)
    if not _NAME.fullmatch(name):
        raise ExportError(
            "the name is not legal",
            got=name,
            allowed="up to 63 small letters, digits and dashes, no dash at the ends",
        )
    if max_batch < 1 or wait_ms < 0:
        raise ExportError("the batching is not legal", got=f"{max_batch} inputs, {wait_ms} ms")
    labels = told.labels if outputs[0].name == "logits" and len(outputs[0].shape) == 2 else ()
    config = _config(name, inputs, outputs, labels, max_batch, wait_ms)
    with appearing(target) as part:
        model = part / name
        (model / "1").mkdir(parents=True)
        shutil.copyfile(source, model / "1" / "model.onnx")
        data = source.with_name(source.name + "_data")
        if data.is_file():  # weights of large graphs lie beside them, under the name in the graph
            shutil.copyfile(data, model / "1" / data.name)
        (model / "config.pbtxt").write_text(config, encoding="utf-8")
        if labels:
            lines = "".join(f"{' '.join(label.split())}\n" for label in labels)
            (model / _LABELS).write_text(lines, encoding="utf-8")
    return target / name


def legal_name(word: str) -> str:
    """Return a word as a name that Triton and Kubernetes take."""
    return re.sub(r"[^a-z0-9]+", "-", word.lower())[:63].strip("-") or "model"


class appearing:
    """A folder that appears whole or not at all: a temporary one beside it takes its place."""

    def __init__(self, target: Path) -> None:
        """Take where it goes; raises ExportError where something is there."""
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ExportError("there is something already", where=target, hint="give a new --out")
        if not target.parent.is_dir():
            raise ExportError("the folder to write into does not exist", where=target.parent)
        self._target = target

    def __enter__(self) -> Path:
        self._part = Path(
            tempfile.mkdtemp(prefix=f".{self._target.name}.", dir=self._target.parent)
        )
        self._part.chmod(0o755)
        return self._part

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            if self._target.is_dir():
                self._target.rmdir()
            self._part.rename(self._target)
        else:
            shutil.rmtree(self._part, ignore_errors=True)


def _config(
    name: str,
    inputs: Sequence[ort.NodeArg],
    outputs: Sequence[ort.NodeArg],
    labels: Sequence[str],
    max_batch: int,
    wait_ms: float,
) -> str:
    """Return config.pbtxt. Its shapes leave the batch out; -1 is a dynamic dim."""
    blocks = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch}",
        *(_tensor("input", value, None) for value in inputs),
        *(_tensor("output", value, _LABELS if labels else None) for value in outputs),
        f"dynamic_batching {{ max_queue_delay_microseconds: {round(1000 * wait_ms)} }}",
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
    ]
    return "\n".join(blocks) + "\n"


def _tensor(kind: str, value: Any, labels: str | None) -> str:
    first, *rest = value.shape
    if isinstance(first, int):
        raise ExportError(
            "the graph's batch is fixed", where=value.name, got=value.shape, allowed="a dynamic one"
        )
    if value.type not in _TYPES:
        raise ExportError("Triton has no such type", where=value.name, got=value.type)
    dims = ", ".join(str(dim if isinstance(dim, int) else -1) for dim in rest)
    more = "" if labels is None else f" label_filename: {_quoted(labels)}"
    return (
        f"{kind} [ {{ name: {_quoted(value.name)} data_type: {_TYPES[value.type]} "
        f"dims: [ {dims} ]{more} }} ]"
    )


def _quoted(text: str) -> str:
    return json.dumps(text)  # protobuf's strings have JSON's escapes for ASCII
