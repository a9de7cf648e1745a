"""Quantise, check and time a finished slimfuse model folder on the device that runs it.

Needs numpy, onnx and onnxruntime; never torch, transformers or slimfuse itself.
"""

from slimfuse_export.bench import bench
from slimfuse_export.environment import environment
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.folder import CheckResult, check_folder
from slimfuse_export.graph import check_dims, check_graph, model_bytes
from slimfuse_export.inputs import make_inputs, resize_batch
from slimfuse_export.latency import BenchResult, Key, Latency, Ratio, bootstrap_ratio
from slimfuse_export.metadata import (
    Metadata,
    Provenance,
    min_onnxruntime,
    read_metadata,
    stamp,
    stamp_file,
)
from slimfuse_export.optimization import Optimized, Trial, optimize_folder
from slimfuse_export.parity import (
    Case,
    Parity,
    check_parity,
    compare,
    load_reference,
    save_reference,
)
from slimfuse_export.quantize import (
    QuantizationPlan,
    Quantized,
    int8_saturates,
    quantization_plan,
    quantize_dynamic_int8,
)
from slimfuse_export.sessions import open_session, run_session

__version__ = "0.1.0"

__all__ = [
    "BenchResult",
    "Case",
    "CheckFailed",
    "CheckResult",
    "ExportError",
    "Key",
    "Latency",
    "Metadata",
    "Optimized",
    "Parity",
    "Provenance",
    "QuantizationPlan",
    "Quantized",
    "Ratio",
    "Trial",
    "bench",
    "bootstrap_ratio",
    "check_dims",
    "check_folder",
    "check_graph",
    "check_parity",
    "compare",
    "environment",
    "int8_saturates",
    "load_reference",
    "make_inputs",
    "min_onnxruntime",
    "model_bytes",
    "open_session",
    "optimize_folder",
    "quantization_plan",
    "quantize_dynamic_int8",
    "read_metadata",
    "resize_batch",
    "run_session",
    "save_reference",
    "stamp",
    "stamp_file",
]
