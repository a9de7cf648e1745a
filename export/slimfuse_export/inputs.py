"""Random inputs that fit what a model declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slimfuse_export.errors import ExportError

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def make_inputs(
    session: ort.InferenceSession,
    batch: int,
    *,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Return one array for every declared input, drawn with `seed`.

    batch: substituted for a dynamic first dim. dims: sizes of the other dynamic dims, by name.
    Floats are standard normal; masks and bools are ones; other integers are 0 or 1, which every
    vocabulary and token type has.
    Raises: ExportError naming every dim without a size, a fixed first dim that is not `batch`,
    and types it can't draw.
    """
    rng = np.random.default_rng(seed)
    sizes = dims or {}
    gaps: list[str] = []
    arrays: dict[str, NDArray[Any]] = {}
    for value in session.get_inputs():
        shape: list[int] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                if axis == 0 and dim != batch:
                    gaps.append(f"{value.name}: batch is fixed at {dim}, not {batch}")
                shape.append(dim)
            elif axis == 0:
                shape.append(batch)
            elif dim in sizes:
                shape.append(sizes[dim])
            else:
                gaps.append(f"{value.name}: dim {axis} ({dim or 'unnamed'}) has no size")
        if value.type not in _DTYPES:
            gaps.append(f"{value.name}: can't draw {value.type}")
        if not gaps:
            arrays[value.name] = _draw(rng, value.name, shape, _DTYPES[value.type])
    if gaps:
        raise ExportError(
            "no inputs can be made for this model",
            got="; ".join(gaps),
            hint="give the sizes of dynamic dims, as in --dim sequence_length=128",
        )
    return arrays


def _draw(
    rng: np.random.Generator, name: str, shape: list[int], dtype: type[np.generic]
) -> NDArray[Any]:
    if dtype is np.bool_ or (np.issubdtype(dtype, np.integer) and "mask" in name):
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def resize_batch(inputs: Mapping[str, NDArray[Any]], batch: int) -> dict[str, NDArray[Any]]:
    """Return the inputs with their rows (dim 0) repeated in order, or cut, to `batch` rows."""
    return {name: np.take(a, np.arange(batch) % len(a), axis=0) for name, a in inputs.items()}


def dynamic_dims(
    session: ort.InferenceSession, inputs: Mapping[str, NDArray[Any]]
) -> dict[str, int]:
    """Return the named dynamic dims but for the first, with their sizes in the given inputs."""
    return {
        dim: inputs[value.name].shape[axis]
        for value in session.get_inputs()
        for axis, dim in enumerate(value.shape)
        if axis and isinstance(dim, str)
    }


def resize_dims(
    session: ort.InferenceSession, inputs: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]
) -> dict[str, NDArray[Any]]:
    """Return the inputs with the named dims cut to `sizes`, or repeated in order up to them."""
    resized = dict(inputs)
    for value in session.get_inputs():
        for axis, dim in enumerate(value.shape):
            if axis and dim in sizes:
                array = resized[value.name]
                places = np.arange(sizes[dim]) % array.shape[axis]
                resized[value.name] = np.take(array, places, axis)
    return resized
