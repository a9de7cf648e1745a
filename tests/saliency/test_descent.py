"""A budget split by what each size is worth."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from saliency.asked import asked_vit

from slimfuse.families import Shape, ViT
from slimfuse.fuse.scoring import cut_losses
from slimfuse.saliency import score
from slimfuse.shapes import Budget, Meter, Wish, descent, resolve

AXES = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")


def config(width: int = 32, heads: int = 4, mlp: int = 72, depth: int = 3) -> Any:
    return ViT().new_config(
        Shape(width, heads, mlp, depth), patch_size=2, image_size=6, labels=list("abc")
    )


def convex(size: int, scale: float) -> list[float]:
    return [scale * (size - v) ** 2 / size**2 for v in range(size + 1)]


def losses(**scales: float) -> dict[str, list[float]]:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 72,
             "num_hidden_layers": 3}  # fmt: skip
    return {axis: convex(size, scales.get(axis, 1.0)) for axis, size in sizes.items()}


def test_every_rung_is_legal_and_one_step_below_the_one_before() -> None:
    meter = Meter(config(), ViT())
    rungs = descent(meter.top, AXES, meter, losses(), "params")
    assert rungs[0] == meter.top and len(rungs) > 20
    for upper, lower in pairwise(rungs):
        assert meter.why_illegal(lower) is None
        assert meter.params(lower) < meter.params(upper)
        less = [a for a in AXES if getattr(lower, a) < getattr(upper, a)]
        assert less in ([a] for a in AXES) or less == ["hidden_size", "num_attention_heads"]
        assert all(getattr(lower, a) <= getattr(upper, a) for a in AXES)


def test_what_is_worth_nothing_goes_first() -> None:
    meter, free = Meter(config(), ViT()), ("hidden_size", "intermediate_size")
    cheap = descent(meter.top, free, meter, losses(intermediate_size=0.0), "params")
    widths = [shape.hidden_size for shape in cheap]
    assert widths[: widths.index(32) + 1] and cheap[widths.count(32) - 1].intermediate_size == 1
    dear = descent(meter.top, free, meter, losses(intermediate_size=1e9), "params")
    assert [s.intermediate_size for s in dear].count(72) == len({s.hidden_size for s in dear})


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
def test_it_comes_near_the_best_of_all_shapes(share: float) -> None:
    meter, free = Meter(config(), ViT()), ("hidden_size", "intermediate_size")
    told = losses(intermediate_size=0.3)

    def lost(shape: Shape) -> float:
        return sum(told[a][getattr(shape, a)] for a in free)

    every = [Shape(d, 4, m, 3) for d, m in product(range(8, 33, 4), range(1, 73))]
    limit = share * meter.flops(meter.top)
    best = min(lost(s) for s in every if meter.flops(s) <= limit)
    found = resolve(Wish(budget=Budget("flops", share), free=free), config(), ViT(), losses=told)
    assert meter.flops(found.shape) <= limit
    proportional = resolve(Wish(budget=Budget("flops", share), free=free), config(), ViT())
    assert best <= lost(found.shape) <= min(best + 0.05, lost(proportional.shape) + 1e-12)
    assert any("where least is lost" in note for note in found.notes)


def test_a_latency_is_measured_on_few_rungs() -> None:
    calls: list[Any] = []

    def time_ratio(narrow: Any) -> float:
        calls.append(narrow)
        return float(narrow.intermediate_size) / 72

    wish = Wish(budget=Budget("latency_ratio", 0.5), free=("intermediate_size",))
    found = resolve(wish, config(), ViT(), time_ratio=time_ratio, losses=losses())
    assert found.shape.intermediate_size <= 36 and len(calls) <= 6


@pytest.mark.parametrize("mended", [True, False])
def test_losses_of_a_model_rise_as_it_shrinks(mended: bool) -> None:
    subject = asked_vit(30)
    found = cut_losses(subject, mended=mended)
    sizes = {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 17,
             "num_hidden_layers": 2}  # fmt: skip
    assert {axis: len(curve) - 1 for axis, curve in found.items()} == sizes
    for curve in found.values():
        assert curve[-1] == 0
        assert all(a >= b for a, b in pairwise(curve))
    fisher = score("mask-fisher", subject)
    units = torch.stack([fisher[f"mlp.{i}"] for i in range(2)])
    assert found["intermediate_size"][0] == pytest.approx(float(units.sum()), rel=2e-2)  # the ridge
    if not mended:
        least = float(units.min(1).values.sum())
        assert found["intermediate_size"][16] == pytest.approx(least)
