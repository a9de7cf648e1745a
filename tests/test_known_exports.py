"""A kept export is taken only for the very same model, example and settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from known_exports import name_of
from tiny import images
from torch import nn

from slimfuse.batch import Batch


class Scaled(nn.Linear):
    """A layer whose answer depends on a number that is in no state dict."""

    def __init__(self, given: float) -> None:
        torch.manual_seed(0)
        super().__init__(3, 2)
        self.register_buffer("given", torch.tensor(given), persistent=False)


def name(given: float = 1.0, n: int = 2, opset: int = 20, weight: float | None = None) -> str:
    model = Scaled(given)
    if weight is not None:
        with torch.no_grad():
            model.bias[1] = weight
    return name_of(model, Batch({"pixel_values": images(n)}), {"opset": opset})


def test_the_same_has_one_name() -> None:
    assert name() == name()


@pytest.mark.parametrize("change", [{"given": 2.0}, {"n": 3}, {"opset": 21}, {"weight": 1e-9}])
def test_what_differs_has_another(change: dict[str, Any]) -> None:
    assert name(**change) != name()
