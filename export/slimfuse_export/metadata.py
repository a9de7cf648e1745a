"""What an ONNX file says of itself: what it needs, what made it, and of what."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx

from slimfuse_export._files import replacing
from slimfuse_export.errors import ExportError
from slimfuse_export.graph import load_header

PREFIX = "slimfuse."
PRODUCER = "slimfuse"
STANDARD = ("", "ai.onnx")
CONTRIB = "com.microsoft"
# First onnxruntime release for an operator set and for a file format (IR): each release of 1.19 to
# 1.26 was asked to open files of them. What 1.19 opens may be older; no older one was asked.
_SINCE_OPSET = {22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24", 26: "1.25"}
_SINCE_IR = {11: "1.23", 12: "1.24", 13: "1.24"}
_OLDEST = "1.19"


@dataclass(frozen=True)
class Provenance:
    """What a model was made of.

    recipe: sha256 of the run's recipe.lock.yaml. parents: sha256 or place of origin by name.
    licences: of the parents, by name.
    """

    recipe: str
    parents: Mapping[str, str] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Metadata:
    """What `stamp` wrote into a file.

    opset: of the standard operators. min_onnxruntime: first release that opens it. history: the
    steps that made it, in order. machine_specific: it may be slow or refused on other CPUs.
    """

    opset: int
    min_onnxruntime: str
    producer: str
    history: tuple[str, ...] = ()
    machine_specific: bool = False
    provenance: Provenance | None = None


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators a model uses, 0 where it names none."""
    return max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)


def min_onnxruntime(model: onnx.ModelProto) -> str:
    """Return the first onnxruntime release, of 1.19 and later, that opens the model, as "1.21".

    Raises: ExportError for an operator set or format newer than any known here.
    """
    needs = [_OLDEST]
    for what, value, known in (
        ("operator set", opset_of(model), _SINCE_OPSET),
        ("file format", model.ir_version, _SINCE_IR),
    ):
        if value > max(known):
            raise ExportError(
                f"the model's {what} is too new", got=value, allowed=f"up to {max(known)}"
            )
        needs += [known[value]] if value in known else []
    return max(needs, key=release)


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, to compare by."""
    return tuple(int(part) for part in version.split(".")[:2])


def stamp(
    model: onnx.ModelProto,
    *,
    step: str | None = None,
    provenance: Provenance | None = None,
    machine_specific: bool = False,
    before: onnx.ModelProto | None = None,
) -> None:
    """Write into the model what it needs and what it is made of; no clock, no path.

    step: appended to its history. provenance: kept from `before` where None. before: the model it
    was made from, whose metadata is kept.
    """
    source = model if before is None else before
    old = _found(source)
    made_of = provenance or (old.provenance if old else None)
    history = [*(old.history if old else ()), *([step] if step else [])]
    others = {p.key: p.value for p in source.metadata_props if not p.key.startswith(PREFIX)}
    values = {
        "opset": str(opset_of(model)),
        "min_onnxruntime": min_onnxruntime(model),
        "history": json.dumps(history, ensure_ascii=False),
    }
    if machine_specific or (old is not None and old.machine_specific):
        values["machine_specific"] = "true"
    if made_of is not None:
        values["provenance"] = json.dumps(asdict(made_of), ensure_ascii=False, sort_keys=True)
    del model.metadata_props[:]
    for key, value in (*others.items(), *((PREFIX + k, v) for k, v in values.items())):
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.producer_version = PRODUCER, ""


def stamp_file(
    path: str | os.PathLike[str],
    *,
    step: str | None = None,
    provenance: Provenance | None = None,
) -> None:
    """Stamp the file in place, see `stamp`; data files beside it stay as they are."""
    path = Path(path)
    model = load_header(path)
    stamp(model, step=step, provenance=provenance)
    with replacing(path) as part:
        part.write_bytes(model.SerializeToString(deterministic=True))


def read_metadata(path: str | os.PathLike[str]) -> Metadata | None:
    """Return what `stamp` wrote, None where the file was never stamped.

    Raises: ExportError where the file is missing, is no ONNX model, or what it says is unreadable.
    """
    try:
        return _found(load_header(path))
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(
            "the model's metadata can't be read", where=path, got=f"{type(error).__name__}: {error}"
        ) from error


def _found(model: onnx.ModelProto) -> Metadata | None:
    said = {
        p.key.removeprefix(PREFIX): p.value
        for p in model.metadata_props
        if p.key.startswith(PREFIX)
    }
    if "opset" not in said:
        return None
    made_of = json.loads(said["provenance"]) if "provenance" in said else None
    return Metadata(
        opset=int(said["opset"]),
        min_onnxruntime=said["min_onnxruntime"],
        producer=model.producer_name,
        history=tuple(_strings(json.loads(said.get("history", "[]")))),
        machine_specific=said.get("machine_specific") == "true",
        provenance=Provenance(**made_of) if made_of is not None else None,
    )


def _strings(values: Sequence[object]) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError("the history is no list of words")
    return [str(value) for value in values]
