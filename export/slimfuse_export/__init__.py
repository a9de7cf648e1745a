"""Quantise, check and time a finished slimfuse model folder on the device that runs it.

Needs numpy, onnx and onnxruntime; never torch, transformers or slimfuse itself.
"""

from slimfuse_export.bench import bench
from slimfuse_export.environment import environment
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.folder import CheckResult, check_folder
from slimfuse_export.graph import check_dims, check_graph, model_bytes
from slimfuse_export.inputs import make_inputs, resize_batch
from slimfuse_export.inspecting import ModelFacts, inspect_folder, inspect_model
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
from slimfuse_export.quantization import (
    Attempt,
    Noise,
    Quantization,
    QuantizationPlan,
    Quantized,
    disagreement,
    fallbacks,
    int8_saturates,
    lost_accuracy,
    product_noise,
    product_weights,
    quantization_plan,
    quantize_dynamic_int8,
    quantize_int4,
    quantize_model,
    quantize_static_int8,
    write_mode,
)
from slimfuse_export.references import distinct_rows, load_rows, reference_cases, rows_of
from slimfuse_export.sessions import open_session, run_session

__version__ = "0.1.0"

__all__ = [
    "Attempt",
    "BenchResult",
    "Case",
    "CheckFailed",
    "CheckResult",
    "ExportError",
    "Key",
    "Latency",
    "Metadata",
    "ModelFacts",
    "Noise",
    "Optimized",
    "Parity",
    "Provenance",
    "Quantization",
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
    "disagreement",
    "distinct_rows",
    "environment",
    "fallbacks",
    "inspect_folder",
    "inspect_model",
    "int8_saturates",
    "load_reference",
    "load_rows",
    "lost_accuracy",
    "make_inputs",
    "min_onnxruntime",
    "model_bytes",
    "open_session",
    "optimize_folder",
    "product_noise",
    "product_weights",
    "quantization_plan",
    "quantize_dynamic_int8",
    "quantize_int4",
    "quantize_model",
    "quantize_static_int8",
    "read_metadata",
    "reference_cases",
    "resize_batch",
    "rows_of",
    "run_session",
    "save_reference",
    "stamp",
    "stamp_file",
    "write_mode",
]
