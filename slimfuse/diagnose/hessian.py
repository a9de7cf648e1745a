"""How many parameters count: exact ranks of Hessians of linear nets, CNNs and transformers.

The Gauss-Newton matrix of a transformer at generic weights has rank P - g, P its parameters and g
the dimension of the group that leaves every answer: so only these changes of basis are legal when
models are aligned (fusion.md §8). Ranks are for float64, with a gap in the spectrum.
Source: arXiv 2106.16225, 2305.09088; diagnostics.md §1, §7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["pre-norm", "post-norm", "rms"]


@dataclass(frozen=True)
class Ranks:
    """Of a squared loss: outer: the Gauss-Newton part H_o, functional: H_f = H - H_o, whole: H."""

    outer: int
    functional: int
    whole: int


def deep_linear(widths: Sequence[int], rank: int | None = None) -> Ranks:
    """Return the ranks of a deep linear net without biases at generic weights.

    widths: inputs, hidden layers, outputs; rank: of the inputs' second moment, None for full.
    """
    outputs, hidden, layers = widths[-1], sum(widths[1:-1]), len(widths) - 1
    r = widths[0] if rank is None else rank
    q, s = min(r, *widths[1:]), min(r, outputs)
    return Ranks(
        q * (r + outputs - q),
        2 * q * hidden + 2 * q * s - layers * q**2,
        2 * q * hidden - layers * q**2 + q * (r + outputs),
    )


def linear_cnn(filters: Sequence[int], kernels: Sequence[int]) -> Ranks:
    """Return the ranks of a linear net of two one-dimensional convolutions without biases.

    filters: m₀, m₁, m₂ of inputs, hidden and outputs; kernels: k₁, k₂, whose outputs are all
    places that fit, of inputs of full rank. `whole` isn't known in closed form: -1.
    """
    (m0, m, m2), (k1, k2) = filters, kernels
    parameters = m * (m0 * k1 + m2 * k2)
    outer = min(m0 * m2 * (k1 + k2 - 1), parameters - m**2)
    return Ranks(outer, 2 * m * min(k1 * m0, k2 * m2), -1)


@dataclass(frozen=True)
class Sizes:
    """Of a transformer that reads numbers: tokens (…, inputs) by one linear layer, no positions.

    kv: key heads, where queries share them; rope: whether queries and keys are turned in pairs.
    """

    inputs: int
    stream: int
    heads: int
    head: int
    hidden: int
    layers: int
    outputs: int
    kv: int = 0
    rope: bool = False


def symmetries(kind: Kind, s: Sizes) -> int:
    """Return g, the dimension of the group of parameters that leaves all answers.

    Norms have ε = 0, MLPs an activation without a scale of its own (GELU, SiLU). pre-norm and
    post-norm: LayerNorm and biases everywhere; rms: RMSNorm, gated MLP, no biases. A post-norm
    stream may not be rotated.
    """
    d, ff, wide = s.stream, s.hidden, s.heads * s.head
    basis = 2 * wide * s.head + 2 * wide  # inside the heads; biases of keys and of values
    sums = (3 * wide + ff) + (wide + ff + 2)  # readers and writers along the all-ones direction
    if kind == "pre-norm":
        rest = 2 * d + s.outputs + (s.inputs + 1)
        return s.layers * (basis + 4 * d + sums) + rest + (d - 1) * (d - 2) // 2 + 1
    if kind == "post-norm":
        ends = 2 * d + s.outputs + s.inputs + 1 + 1
        return s.layers * (basis + sums) + 2 * s.layers * d + 2 * s.layers + ends
    keys = s.kv or s.heads
    scores = keys * s.head * (1 if s.rope else s.head)
    return s.layers * (scores + keys * s.head**2 + ff + 2 * d) + d + d * (d - 1) // 2 + 1


def rank_with_gap(matrix: Tensor) -> tuple[int, float]:
    """Return the numerical rank of a matrix, and by what factor its singular values fall there.

    The cut is where they fall most, below 1e-6 of the largest; a factor under 1e3 says that the
    rank is a matter of opinion.
    """
    values = torch.linalg.svdvals(matrix.double())
    if not len(values) or values[0] == 0:
        return 0, inf
    least = torch.finfo(torch.float64).eps * float(values[0])
    told = (values / values[0]).clamp_min(least * 1e-3)
    falls = told[:-1] / told[1:]
    low = told[1:] < 1e-6
    if not bool(low.any()):
        return len(values), inf
    place = int(torch.where(low, falls, torch.zeros_like(falls)).argmax())
    return place + 1, float(falls[place])
