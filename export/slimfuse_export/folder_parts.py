"""Checks of a folder's parts by themselves; each returns what was found or raises ExportError."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.graph import load_header
from slimfuse_export.metadata import Provenance, min_onnxruntime, opset_of, read_metadata, release

LOCK = "recipe.lock.yaml"
_MAX_HEADER = 100 * 2**20  # bytes of JSON, the limit of the safetensors library


def config_named(path: Path) -> str:
    """Return the class that config.json names."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ExportError("config.json can't be read", got=type(error).__name__) from error
    if not isinstance(config, dict):
        raise ExportError("config.json is no JSON object", got=type(config).__name__)
    named = config.get("architectures") or config.get("architecture") or "no architecture named"
    return ", ".join(named) if isinstance(named, list) else str(named)


def weights_whole(path: Path) -> str:
    """Read the header alone: tensors must tile the rest of the file without gap or overlap."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(handle.read(length))
        spans = sorted(header[name]["data_offsets"] for name in header if name != "__metadata__")
        edges = [0, *(end for _, end in spans)]
        if [begin for begin, _ in spans] != edges[:-1] or edges[-1] != size - 8 - length:
            raise ValueError(f"tensors end at {edges[-1]} of {size - 8 - length} bytes of data")
    except (OSError, ValueError, TypeError, KeyError) as error:
        detail = f"{type(error).__name__}: {error}" if isinstance(error, ValueError) else None
        raise ExportError(
            "the weights are missing or cut off", got=detail or type(error).__name__
        ) from error
    return f"{len(spans)} tensors, {size:,} bytes"


def metadata_true(path: Path, *, default: bool, made_of: Provenance | None = None) -> str:
    """Hold what a model says of itself against the graph, this onnxruntime and its provenance.

    default: whether it is the file that consumers open unasked, which must fit any machine.
    made_of: the provenance that it must share.
    """
    said = read_metadata(path)
    if said is None:
        raise CheckFailed(
            "the model does not say what it needs", where=path,
            hint="make it again with this version, or use slimfuse_export.stamp_file",
        )  # fmt: skip
    model = load_header(path)
    facts = {"opset": opset_of(model), "min_onnxruntime": min_onnxruntime(model)}
    wrong = [f"{key} {getattr(said, key)}, in truth {value}" for key, value in facts.items()
             if getattr(said, key) != value]  # fmt: skip
    if wrong:
        raise CheckFailed("the model says what is not so", where=path, got="; ".join(wrong))
    installed = version("onnxruntime")
    if release(installed) < release(said.min_onnxruntime):
        raise CheckFailed(
            "the model needs a newer onnxruntime", where=path, got=installed,
            allowed=f"{said.min_onnxruntime} or newer",
        )  # fmt: skip
    if default and said.machine_specific:
        raise CheckFailed("the model was made for one machine, but is the folder's default",
                          where=path)  # fmt: skip
    if made_of is not None and said.provenance != made_of:
        raise CheckFailed("the models of the folder are made of different things", where=path)
    told = f"opset {said.opset}, onnxruntime {said.min_onnxruntime} or newer"
    return told + (f", recipe {said.provenance.recipe[:12]}…" if said.provenance else "")


def recipe_beside(folder: Path, made_of: Provenance) -> str:
    """Hold the recipe that a model names against the lock file of its run folder."""
    found = hashlib.sha256((folder.parent / LOCK).read_bytes()).hexdigest()
    if found != made_of.recipe:
        raise CheckFailed(
            "the model was made by another recipe than the one beside it", where=folder,
            got=f"sha256 {made_of.recipe}", allowed=f"{found}, of {LOCK}",
        )  # fmt: skip
    return f"the model's recipe is {LOCK} beside it"
