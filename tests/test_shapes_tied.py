"""The planner where the class ties the MLP's width to the stream's (DINOv2's whole mlp_ratio)."""

from __future__ import annotations

from typing import Any

import pytest

from slimfuse.errors import ShapeError
from slimfuse.families import Dinov2, Shape, ViT
from slimfuse.shapes import Budget, Meter, Wish, ladder, resolve

TOP = Shape(48, 6, 192, 4)  # mlp_ratio 4


def parent(family: Any = None) -> Any:
    family = family or Dinov2()
    return family.new_config(TOP, patch_size=2, image_size=6, labels=("a", "b", "c"))


def test_only_a_class_of_ratios_is_tied() -> None:
    assert Meter(parent(), Dinov2()).tied
    assert not Meter(parent(ViT()), ViT()).tied


@pytest.mark.parametrize(
    ("wish", "shape"),
    [
        (Wish(0.5), Shape(24, 6, 96, 4)),
        (Wish(0.6), Shape(30, 6, 120, 4)),  # 28.8 units; 30 doesn't divide the parent's 192
        (Wish(42), Shape(42, 6, 168, 4)),
        (Wish(0.6, intermediate_size=0.3), Shape(30, 6, 60, 4)),  # 57.6 units; multiples of 30
        (Wish(0.6, intermediate_size=48), Shape(24, 6, 48, 4)),  # of what divides 48
        (Wish(intermediate_size=0.5), Shape(48, 6, 96, 4)),
        (Wish(0.75, 0.5), Shape(36, 3, 144, 4)),
    ],
)
def test_ratios_go_to_the_nearest_legal_value(wish: Wish, shape: Shape) -> None:
    assert resolve(wish, parent(), Dinov2()).shape == shape


def test_numbers_that_are_no_multiple_are_refused_with_one_that_is() -> None:
    with pytest.raises(ShapeError, match="multiple of hidden_size") as caught:
        resolve(Wish(24, intermediate_size=100), parent(), Dinov2())
    assert caught.value.where == "target.intermediate_size"
    assert caught.value.allowed == "intermediate_size 96"


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("value", [0.2, 0.45, 0.7])
def test_a_budget_keeps_the_parents_ratio(kind: Any, value: float) -> None:
    found = resolve(Wish(budget=Budget(kind, value)), parent(), Dinov2())
    shape = found.shape
    assert shape.intermediate_size == 4 * shape.hidden_size
    assert getattr(found.chosen, f"{kind}_ratio") <= value
    meter = Meter(parent(), Dinov2())
    wider = Shape(shape.hidden_size + 6, 6, 4 * (shape.hidden_size + 6), 4)
    assert not meter.meets(Budget(kind, value), wider)  # the next legal width is over it


def test_heads_that_fall_with_the_width_take_the_mlp_along() -> None:
    meter = Meter(parent(), Dinov2())
    free = ("hidden_size", "num_attention_heads", "intermediate_size")
    assert ladder(TOP, free, meter) == [Shape(8 * h, h, 32 * h, 4) for h in range(6, 0, -1)]


def test_a_number_stays_under_a_budget() -> None:
    wish = Wish(intermediate_size=96, budget=Budget("params", 0.5), free=("hidden_size",))
    shape = resolve(wish, parent(), Dinov2()).shape
    assert shape.intermediate_size == 96 and 96 % shape.hidden_size == 0
