"""Products of an ONNX file ranked by a forecast of its layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slimfuse_export import product_weights
from slimfuse_export.quantization import Mode
from torch import nn
from transformers.pytorch_utils import Conv1D

from slimfuse.diagnose.rounding import linear_layers, matrix
from slimfuse.pipeline import Run
from slimfuse.pipeline.forecasting import forecast_ranking, products_of
from slimfuse.pipeline.job import prepare
from slimfuse.recipe import Recipe, load_recipe


def test_layers_find_their_products_however_they_lie() -> None:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "a": nn.Linear(3, 3), "b": nn.Linear(3, 2), "c": Conv1D(2, 3), "gone": nn.Linear(3, 2),
    }  # fmt: skip
    weights = {
        "p": matrix(layers["a"]).T.numpy(), "q": matrix(layers["b"]).numpy(),
        "r": layers["c"].weight.detach().numpy(), "other": np.ones((3, 2), np.float32),
    }  # fmt: skip
    assert products_of(layers, weights) == {"a": "p", "b": "q", "c": "r"}


@pytest.mark.parametrize("mode", ["dynamic", "int4"])
def test_every_product_of_a_run_is_ranked(finished: Run, tiny_recipe, mode: Mode) -> None:
    loaded = load_recipe(tiny_recipe)
    assert isinstance(loaded, Recipe)
    job = prepare(loaded, tiny_recipe)
    onnx = finished.model / "onnx" / "model.onnx"
    ranked = forecast_ranking(job, finished.model, onnx, mode, samples=4)
    assert sorted(ranked) == sorted(product_weights(onnx))
    model = job.family.load(finished.model, attention="eager")
    assert len(ranked) == len(linear_layers(model))
