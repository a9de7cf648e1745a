"""Quantised files: dynamic INT8, static INT8 and 4-bit weights."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from slimfuse_export._files import replacing
from slimfuse_export.errors import ExportError
from slimfuse_export.graph import check_graph, load_model, model_bytes, save_model
from slimfuse_export.metadata import stamp
from slimfuse_export.quantization.products import (
    OP_TYPES,
    excluded,
    made_small,
    named,
    without_weights,
)
from slimfuse_export.sessions import Arrays, first_line, open_session

Mode = Literal["dynamic", "static", "int4"]
BLOCK = 32  # weights that share a scale in 4 bits
INT8_ACTIVATIONS = 4  # the library's word for computing 4-bit products in 8-bit integers
Writer = Callable[[onnx.ModelProto, Path, list[str]], None]


@dataclass(frozen=True)
class Quantized:
    """What quantising did: products made small, bytes on disk before and after, and how.

    kept_float: names of products that stayed float32.
    """

    products: int
    source_bytes: int
    bytes: int
    per_channel: bool
    reduce_range: bool
    mode: Mode = "dynamic"
    kept_float: tuple[str, ...] = ()


def quantize_dynamic_int8(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    per_channel: bool = True,
    reduce_range: bool = False,
    keep_float: Sequence[str] = (),
) -> Quantized:
    """Write the model at `src` with INT8 weights and dynamically quantised activations to `dst`.

    Only products with a constant right-hand side change. `dst` appears whole, after onnx.checker
    and onnxruntime have accepted it, or not at all; equal sources give equal bytes.
    per_channel: one scale for each output column. reduce_range: see `QuantizationPlan`.
    keep_float: names of products' nodes or weights that stay float32.
    Raises: ExportError for a missing or corrupt source, one without such a product, unknown names,
    or one the library can't quantise; CheckFailed where its result is invalid.
    """

    def write(model: onnx.ModelProto, part: Path, exclude: list[str]) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            model, str(part), op_types_to_quantize=list(OP_TYPES), nodes_to_exclude=exclude,
            per_channel=per_channel, reduce_range=reduce_range, weight_type=QuantType.QInt8,
        )  # fmt: skip

    made, sizes = _written(Path(src), Path(dst), write, "dynamic INT8", keep_float)
    return Quantized(made, *sizes, per_channel, reduce_range, "dynamic", tuple(keep_float))


def quantize_static_int8(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    calibration: Sequence[Arrays],
    *,
    per_channel: bool = True,
    reduce_range: bool = False,
    signed: bool = False,
    keep_float: Sequence[str] = (),
) -> Quantized:
    """Write the model at `src` in QDQ form to `dst`: activations have ranges fixed beforehand.

    calibration: inputs by name, of any number of rows; the ranges are the smallest and largest
    values they give. Products' outputs stay float32. signed: see `QuantizationPlan`. The rest, and
    what is raised: as `quantize_dynamic_int8`, and ExportError for no calibration inputs.
    """
    if not calibration:
        raise ExportError("static INT8 needs calibration inputs", hint="give samples, or dynamic")

    def write(model: onnx.ModelProto, part: Path, exclude: list[str]) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        quantize_static(
            model, str(part), _reader(calibration), quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OP_TYPES),
            nodes_to_exclude=[*exclude, *without_weights(model.graph)],
            per_channel=per_channel, reduce_range=reduce_range, weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            extra_options={
                "OpTypesToExcludeOutputQuantization": list(OP_TYPES), "ActivationSymmetric": signed,
            },
        )  # fmt: skip

    made, sizes = _written(Path(src), Path(dst), write, "static INT8", keep_float)
    return Quantized(made, *sizes, per_channel, reduce_range, "static", tuple(keep_float))


def quantize_int4(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, keep_float: Sequence[str] = ()
) -> Quantized:
    """Write the model at `src` with 4-bit weights, 32 to a scale, to `dst`.

    The products become com.microsoft.MatMulNBits, which computes in 8-bit integers. The rest, and
    what is raised: as `quantize_dynamic_int8`.
    """

    def write(model: onnx.ModelProto, part: Path, exclude: list[str]) -> None:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        plain = ONNXModel(model)
        plain.replace_gemm_with_matmul()  # its bias is an operator of its own to the quantiser
        quantizer = MatMulNBitsQuantizer(
            plain.model, bits=4, block_size=BLOCK, is_symmetric=True,
            accuracy_level=INT8_ACTIVATIONS, nodes_to_exclude=exclude,
        )  # fmt: skip
        quantizer.process()
        save_model(quantizer.model.model, part)

    made, sizes = _written(Path(src), Path(dst), write, "int4", keep_float)
    return Quantized(made, *sizes, True, False, "int4", tuple(keep_float))


def _written(
    src: Path, dst: Path, write: Writer, step: str, keep_float: Sequence[str]
) -> tuple[int, tuple[int, int]]:
    """Return how many products became small, and the bytes of both files."""
    source = load_model(src)  # given a path, the library writes *-inferred.onnx beside it
    if dst.exists() and dst.samefile(src):
        raise ExportError("the quantised model would overwrite its source", where=src)
    model = onnx.ModelProto()
    model.CopyFrom(source)
    named(model)
    exclude = excluded(model.graph, keep_float)
    with replacing(dst) as part:
        try:
            with _quiet():
                write(model, part, exclude)
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                "onnxruntime can't quantise the model", where=src, got=first_line(error)
            ) from error
        made = load_model(part)
        stamp(made, before=source, step=step + (f", {len(keep_float)} float" * bool(keep_float)))
        save_model(made, part)
        check_graph(part)
        open_session(part, threads=1)
        count = made_small(made.graph)
        if not count:
            what = "nothing to quantise: no matrix product with constant weights"
            raise ExportError(what + " is left" * bool(keep_float), where=src)
    return count, (model_bytes(src), model_bytes(dst))


def _reader(calibration: Sequence[Arrays]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Gives one batch after the other."""

        def __init__(self) -> None:
            self.left: Iterator[Arrays] = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            """Return the next inputs, None at the end."""
            one = next(self.left, None)
            return None if one is None else dict(one)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's advice off the root logger, and its `basicConfig` from installing one."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [logging.NullHandler()]
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers = handlers
        logging.disable(disabled)
