"""Quantised files: which kind suits a CPU, how they are made, and whether they are good enough."""

from slimfuse_export.quantization.choosing import (
    MAX_DROP,
    Attempt,
    Choice,
    Quantization,
    choose_modes,
    quantize_model,
    write_mode,
)
from slimfuse_export.quantization.cpu import QuantizationPlan, int8_saturates, quantization_plan
from slimfuse_export.quantization.files import (
    Mode,
    Quantized,
    quantize_dynamic_int8,
    quantize_int4,
    quantize_static_int8,
)
from slimfuse_export.quantization.noise import Noise, fallbacks, product_noise
from slimfuse_export.quantization.products import product_weights
from slimfuse_export.quantization.quality import Loss, disagreement, lost_accuracy

__all__ = [
    "MAX_DROP",
    "Attempt",
    "Choice",
    "Loss",
    "Mode",
    "Noise",
    "Quantization",
    "QuantizationPlan",
    "Quantized",
    "choose_modes",
    "disagreement",
    "fallbacks",
    "int8_saturates",
    "lost_accuracy",
    "product_noise",
    "product_weights",
    "quantization_plan",
    "quantize_dynamic_int8",
    "quantize_int4",
    "quantize_model",
    "quantize_static_int8",
    "write_mode",
]
