"""Scores of single weights behind one interface: each says which F, and which weights, OBS sees.

Every score is ρ_Q = ½ v_Qᵀ([F⁻¹]_QQ)⁻¹v_Q: magnitude takes F = I, the diagonal Fisher F without
its off-diagonal entries, WoodTaylor v = w − F⁻¹ḡ. One formula then serves every pattern of zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from slimfuse.saliency.inverse import BlockInverse, DiagonalInverse
from slimfuse.saliency.obs import newton

WeightScorer = Literal["woodfisher", "woodtaylor", "diagonal-fisher", "magnitude", "random"]
Curvature = Literal["block", "diagonal", "none"]


@dataclass(frozen=True)
class Blocks:
    """Some blocks of a layer as a scorer sees them, all (n, B) and float64.

    inverse: of the block Fisher (its diagonal alone where no more was asked for), None where the
    scorer needs no curvature; gradient: ḡ for scorers that ask for it; noise: uniform in [0, 1),
    for scorers that need nothing.
    """

    weights: Tensor
    alive: Tensor
    inverse: BlockInverse | None
    gradient: Tensor | None
    noise: Tensor | None


View = tuple[BlockInverse, Tensor]
"""The inverse and the weights (n, B) that the OBS statistic is taken of."""


@dataclass(frozen=True)
class KnownWeightScorer:
    """A scorer of single weights: what it needs, where it comes from, what OBS sees."""

    name: WeightScorer
    needs: Curvature
    gradient: bool
    source: str
    view: Callable[[Blocks], View]


WEIGHT_SCORERS: dict[str, KnownWeightScorer] = {}


def weight_scorer(
    name: WeightScorer, *, needs: Curvature, gradient: bool = False, source: str
) -> Callable[[Callable[[Blocks], View]], Callable[[Blocks], View]]:
    """Register a scorer of single weights under a name."""
    assert name in get_args(WeightScorer), name

    def register(view: Callable[[Blocks], View]) -> Callable[[Blocks], View]:
        WEIGHT_SCORERS[name] = KnownWeightScorer(name, needs, gradient, source, view)
        return view

    return register


@weight_scorer("woodfisher", needs="block", source="Singh & Alistarh 2020, arXiv 2004.14340")
def woodfisher(blocks: Blocks) -> View:
    """Return F and w."""
    assert blocks.inverse is not None
    return blocks.inverse, blocks.weights


@weight_scorer("woodtaylor", needs="block", gradient=True, source="arXiv 2004.14340, on WoodTaylor")
def woodtaylor(blocks: Blocks) -> View:
    """Return F and w − F⁻¹ḡ: the model isn't taken to be at a minimum."""
    assert blocks.inverse is not None
    assert blocks.gradient is not None
    h = newton(blocks.inverse, blocks.gradient * blocks.alive)
    return blocks.inverse, blocks.weights - h


@weight_scorer("diagonal-fisher", needs="diagonal", source="LeCun et al. 1989; Theis et al. 2018")
def diagonal_fisher(blocks: Blocks) -> View:
    """Return diag(λ + mean g²) and w: blocks of one weight."""
    assert blocks.inverse is not None
    return DiagonalInverse(blocks.inverse.curvature(), blocks.inverse.damping), blocks.weights


@weight_scorer("magnitude", needs="none", source="Han et al. 2015, arXiv 1506.02626")
def magnitude(blocks: Blocks) -> View:
    """Return I and w: the limit of large damping."""
    return DiagonalInverse(torch.zeros_like(blocks.weights), 1.0), blocks.weights


@weight_scorer("random", needs="none", source="the control that every comparison needs")
def random(blocks: Blocks) -> View:
    """Return I and random numbers in the weights' place."""
    assert blocks.noise is not None
    return DiagonalInverse(torch.zeros_like(blocks.weights), 1.0), blocks.noise * blocks.alive
