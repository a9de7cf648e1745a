"""Small parents and, by enumeration, every legal shape below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import tiny

from slimfuse.families import Shape, ViT
from slimfuse.shapes import (
    AXES,
)

WIDTH, HEADS, MLP, DEPTH = AXES


def parent(width: int = 32, heads: int = 4, mlp: int = 72, depth: int = 3) -> Any:
    return tiny.vit_config(
        hidden_size=width, num_attention_heads=heads, intermediate_size=mlp,
        num_hidden_layers=depth,
    )  # fmt: skip


def weights(config: Any) -> int:
    """Return the parameters of a ViT by the formula, for an independent count."""
    d, m = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    block = 4 * (d * d + d) + 2 * d * m + m + d + 4 * d
    embed = d + (patches + 1) * d + config.num_channels * config.patch_size**2 * d + d
    head = 2 * d + d * config.num_labels + config.num_labels
    return int(embed + config.num_hidden_layers * block + head)


COUNTS: dict[str, Callable[[Any], int]] = {"params": weights, "flops": ViT().flops}


def count(kind: str, config: Any, shape: Shape) -> int:
    return COUNTS[kind](ViT().narrow(config, shape))


def nearest(values: Sequence[int], goal: Fraction) -> int:
    return min(values, key=lambda v: (abs(v - goal), -v))


class Timer:
    """A stopwatch that answers from a formula of the FLOPs' ratio, and counts."""

    def __init__(self, config: Any, formula: Callable[[float], float]) -> None:
        self.whole, self.formula, self.calls = ViT().flops(config), formula, 0

    def __call__(self, config: Any) -> float:
        self.calls += 1
        return self.formula(ViT().flops(config) / self.whole)
