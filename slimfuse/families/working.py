"""Working forms: modules that compute what stock ones do, with parameters that stand apart.

Some classes keep several projections in one matrix, or a matrix as its transpose. Legs, moments
and fits need each projection by itself, rows first, so a family may load a model with these
modules instead; `Family.save` writes the stock form again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


class SplitLinear(nn.Module):
    """Linear layers of one input side by side: y = [W₁ x + b₁, W₂ x + b₂, …].

    The same function as one layer with the stacked rows [W₁; W₂; …]. Parts are children by their
    names, in the order of the outputs.
    """

    def __init__(self, parts: Mapping[str, nn.Linear]) -> None:
        """Take the layers by their names, all with the same inputs and all with or without bias."""
        super().__init__()
        assert len({part.in_features for part in parts.values()}) == 1
        assert len({part.bias is None for part in parts.values()}) == 1
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def parts(self) -> Iterator[nn.Linear]:
        """The layers in the order of their outputs."""
        for part in self.children():
            assert isinstance(part, nn.Linear)
            yield part

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return next(self.parts).in_features

    @property
    def out_features(self) -> int:
        """Features of all outputs together."""
        return sum(part.out_features for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (…, out_features) of all layers for x (…, in_features)."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def split_linear(
    weight: Tensor, bias: Tensor | None, names: Sequence[str], sizes: Sequence[int] | None = None
) -> SplitLinear:
    """Return the parts of a linear layer with weight (out, in) and bias (out,) or none.

    sizes: output features of each part, in order; by default all alike. The parts are views of
    the given tensors: nothing is copied.
    """
    sizes = sizes or [len(weight) // len(names)] * len(names)
    assert sum(sizes) == len(weight), "the parts don't make up the layer"
    biases: Sequence[Tensor | None] = [None] * len(names) if bias is None else bias.split(sizes)
    rows = zip(names, weight.split(sizes), biases, strict=True)
    return SplitLinear({name: _linear(part, own) for name, part, own in rows})


def merge_linear(split: SplitLinear) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out,) or none of the one layer with the same outputs."""
    parts = list(split.parts)
    weight = torch.cat([part.weight.detach() for part in parts])
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    return weight, torch.cat(biases) if biases else None


def linear_of(conv: Conv1D) -> nn.Linear:
    """Return the linear layer of transformers' `Conv1D`, which keeps its weight as (in, out)."""
    return _linear(conv.weight.detach().T.contiguous(), conv.bias)


def conv1d_of(linear: nn.Linear | SplitLinear) -> Conv1D:
    """Return the `Conv1D` with the same outputs; a layer without bias gets one of 0."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(linear, SplitLinear):
        weight, bias = merge_linear(linear)
    else:
        weight, bias = linear.weight.detach(), linear.bias
    with torch.device("meta"):
        conv = Conv1D(weight.shape[0], weight.shape[1])
    conv.weight = nn.Parameter(weight.T.contiguous())
    conv.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias.detach())
    return conv


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return the layer that holds these very tensors."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear
