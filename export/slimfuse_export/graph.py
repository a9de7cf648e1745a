"""What an ONNX file says about itself: validity, dynamic dims, bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import onnx

from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.sessions import first_line, require_model

# torch.export's symbols (s18, u0, also inside "s18 + 1"), onnxruntime's and the old exporter's
_ANONYMOUS = re.compile(r"\b[su]\d+\b|^unk__\d+$|_dynamic_axes_\d+$|^dim_?\d+$|^None$|\?")

MAX_BYTES = 2**31 - 1  # of a protobuf message


def check_graph(path: str | os.PathLike[str]) -> None:
    """Raise CheckFailed unless onnx.checker accepts the model, its operators and its types.

    Raises: ExportError where the file does not exist.
    """
    require_model(Path(path))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # ValidationError, InferenceError and RuntimeError share no base
        raise CheckFailed(
            "onnx.checker refuses the model", where=path, got=first_line(error)
        ) from error


def read_graph(path: str | os.PathLike[str]) -> onnx.GraphProto:
    """Return the model's graph, without the weights that lie in data files.

    Raises: ExportError where the file is missing or is no ONNX model.
    """
    return load_header(path).graph


def load_header(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the model without the weights that lie in data files, see `read_graph`."""
    return _load(path, data=False)


def load_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the model with all its weights, see `read_graph`."""
    return _load(path, data=True)


def _load(path: str | os.PathLike[str], *, data: bool) -> onnx.ModelProto:
    require_model(Path(path))
    try:
        return onnx.load(str(path), load_external_data=data)
    except Exception as error:
        raise ExportError("the file is no ONNX model", where=path, got=first_line(error)) from error


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file.

    Raises: ExportError where it is larger than a protobuf file may be.
    """
    if model.ByteSize() >= MAX_BYTES:
        raise ExportError(
            "the model is too large for one file", got=f"{model.ByteSize():,} bytes",
            allowed=f"below {MAX_BYTES:,}",
        )  # fmt: skip
    path.write_bytes(model.SerializeToString(deterministic=True))


def check_dims(path: str | os.PathLike[str]) -> dict[str, tuple[int | str, ...]]:
    """Return the shape of every input and output; each first dim must be dynamic and named.

    Other dims may be fixed; a dynamic one must have a name too.
    Raises: CheckFailed listing every fixed first dim and every anonymous one (`s18`, `unk__0`, …).
    """
    graph = read_graph(path)
    weights = {initializer.name for initializer in graph.initializer}
    shapes: dict[str, tuple[int | str, ...]] = {}
    bad: list[str] = []
    for value in (*graph.input, *graph.output):
        if value.name in weights:  # old graphs list weights among the inputs
            continue
        shape = shape_of(value)
        shapes[value.name] = shape
        bad += [f"{value.name}: {problem}" for problem in _problems(shape)]
    if bad:
        raise CheckFailed(
            "dims are fixed or have no name",
            where=path,
            got="; ".join(bad),
            allowed="a named dynamic first dim, as batch_size; names for other dynamic dims",
            hint="export with dynamic_shapes that carry names, or rename the dims afterwards",
        )
    return shapes


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Return the dims of an input or output: a size, or the name of a dynamic one."""
    return tuple(_dim(dim) for dim in value.type.tensor_type.shape.dim)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param


def _problems(shape: tuple[int | str, ...]) -> Iterable[str]:
    if not shape:
        yield "has no dims"
    for axis, dim in enumerate(shape):
        if isinstance(dim, int):
            if axis == 0:
                yield f"dim 0 is fixed at {dim}"
        elif not dim or _ANONYMOUS.search(dim):
            yield f"dim {axis} is anonymous ({dim or 'no name'})"


def model_bytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes on disk of the model with the data files it refers to."""
    graph = read_graph(path)
    names = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [Path(path), *(Path(path).parent / name for name in sorted(names))]
    return sum(file.stat().st_size for file in files if file.is_file())
