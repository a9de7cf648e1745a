"""ONNX exports of models that were exported before in the same test session."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.onnx._internal.exporter import _registration

from slimfuse.batch import Batch, arrays
from slimfuse.pipeline import deployment


def keep_exports(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let runs export the same weights of the same architecture once: it takes seconds.

    The file is a function of what makes its name; that another process writes the same bytes is
    tested where nothing is kept (tests/test_pipeline.py).
    """
    original = deployment.export_onnx

    def export(model: nn.Module, example: Batch, path: Path, **options: Any) -> None:
        known = folder / f"{name_of(model, example, options)}.onnx"
        if not known.exists():
            original(model, example, path, **options)
            draft = known.with_suffix(f".{os.getpid()}")
            shutil.copyfile(path, draft)
            os.replace(draft, known)  # noqa: PTH105 - tests patch Path.rename
            return
        shutil.copyfile(known, path)

    patch.setattr(deployment, "export_onnx", export)


def keep_registry(patch: pytest.MonkeyPatch) -> None:
    """Let the exporter read its own operators' sources once a process, not for every export.

    That is a seventh of what a tiny model's export takes, and the file's bytes are the same.
    """
    kept = functools.cache(_registration.ONNXRegistry.from_torchlib)
    patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(kept))


def name_of(model: nn.Module, example: Batch, options: dict[str, Any]) -> str:
    """Return a digest of all that an exported file depends on."""
    said = (repr(model), repr(getattr(model, "config", None)), repr(sorted(options.items())))
    found = hashlib.sha256(repr(said).encode())
    for name, value in (*model.state_dict().items(), *model.named_buffers()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    for name, array in arrays(example).items():
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()
