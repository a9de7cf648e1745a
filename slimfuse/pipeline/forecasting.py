"""What computing each product of an ONNX file with small numbers will cost, before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from slimfuse_export import product_weights
from slimfuse_export.quantization import Mode
from torch import nn

from slimfuse.diagnose.probing import Patience
from slimfuse.diagnose.rounding import INT4, INT8, dearest, linear_layers, matrix
from slimfuse.pipeline.diagnosing import Diagnosing, subject
from slimfuse.pipeline.job import Job
from slimfuse.recipe.diagnosing import Diagnose

SAMPLES = 64
SCHEMES = {"dynamic": INT8, "static": INT8, "int4": INT4}  # static ranges round much the same


def forecast_ranking(
    job: Job, folder: Path, onnx: Path, mode: Mode, samples: int = SAMPLES
) -> list[str]:
    """Return the products of a saved model's ONNX file, those first that must stay float.

    Ranked by the KL that rounding each is expected to cost, a number of its weights; no labels, no
    quantised file. Products that no layer has the weights of are left out. samples: held-out ones,
    with one probe each, however long they take, so that equal inputs give equal lists.
    """
    diagnosing = Diagnosing(job, Diagnose(samples=samples), [subject(job, "child", folder)])
    found, _ = diagnosing.rounded({mode: SCHEMES[mode]}, Patience())
    layers = linear_layers(diagnosing.subjects[0].model)
    known = products_of(layers, product_weights(onnx))
    return [known[one.layer] for one in dearest(found, mode) if one.layer in known]


def products_of(
    layers: Mapping[str, nn.Module], weights: Mapping[str, NDArray[Any]]
) -> dict[str, str]:
    """Return each layer's product by their equal weights, which an export may have transposed.

    Layers with the same weights mean the same product.
    """
    by_value: dict[str, str] = {}
    for name, values in weights.items():
        by_value.setdefault(_digest(values), name)
    found = {}
    for name, layer in layers.items():
        values = matrix(layer).float().cpu().numpy()
        for form in (values.T, values):
            if (product := by_value.get(_digest(form))) is not None:
                found[name] = product
                break
    return found


def _digest(values: NDArray[Any]) -> str:
    plain = np.ascontiguousarray(values, dtype=np.float32)
    return sha256(f"{plain.shape}".encode() + plain.tobytes()).hexdigest()
