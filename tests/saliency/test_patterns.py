"""Layouts of groups, exact counts, and which weights are pruned at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from slimfuse.errors import ShapeError, UserError
from slimfuse.saliency.patterns import Layer, Pattern, lowest, parse_pattern, prunable


class Odd(nn.Module):
    """One layer of each kind, and a head that is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.conv = nn.Conv2d(4, 6, (3, 5))
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(4, 6), Conv1D(2, 4))
        self.head = nn.Linear(4, 6)
        self.head.weight = self.words.weight


def test_linear_and_convolution_weights_are_pruned() -> None:
    model = Odd()
    assert prunable(model) == [
        Layer("conv.weight", (6, 4, 3, 5), 1),
        Layer("mlp.0.weight", (6, 4), 1),
        Layer("mlp.1.weight", (4, 2), 0),  # transposed
    ]
    assert [la.name for la in prunable(model, only=["mlp.*"], leave_out=["*.1.*"])] == [
        "mlp.0.weight"
    ]
    with pytest.raises(UserError, match="no layer is left"):
        prunable(model, only=["words.weight", "head.*"])


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 1), Pattern(1, 4), Pattern(2, 2),
                                     Pattern(1, 4, 2)], ids=str)  # fmt: skip
@pytest.mark.parametrize("layer", [Layer("conv", (6, 4, 3, 5), 1), Layer("linear", (6, 4), 1),
                                   Layer("conv1d", (4, 6), 0)], ids=lambda la: la.name)  # fmt: skip
def test_groups_lie_side_by_side_and_come_back(pattern: Pattern, layer: Layer) -> None:
    values = torch.arange(2 * layer.size).view(2, *layer.shape)
    flat = pattern.flat(layer, values)
    assert flat.shape == (2, layer.size)
    for k in range(2):
        assert torch.equal(pattern.back(layer, flat[k]), values[k])
    # every group is `rows` outputs by `columns` neighbouring inputs of one place
    moved = values[0].movedim(layer.input_axis, -1)
    places = {int(v): index for index, v in zip(
        torch.cartesian_prod(*map(torch.arange, moved.shape)).tolist(), moved.flatten(),
        strict=True)}  # fmt: skip
    if pattern.size > 1:
        for group in flat[0].view(-1, pattern.size):
            found = [places[int(v)] for v in group]
            outputs, inputs = ({p[i] for p in found} for i in (0, -1))
            assert len(outputs) == pattern.rows and len(inputs) == pattern.columns
            assert max(inputs) - min(inputs) == pattern.columns - 1
            assert len({tuple(p[1:-1]) for p in found}) == 1
    else:
        assert torch.equal(flat, values.flatten(1))


def test_all_layers_that_do_not_fit_are_named() -> None:
    layers = [Layer("a", (6, 4), 1), Layer("b", (6, 7), 1), Layer("c", (5, 8), 1)]
    with pytest.raises(ShapeError) as error:
        Pattern(2, 4).check(layers)
    assert "b (6, 7); c (5, 8)" in str(error.value)
    Pattern().check(layers)


def test_patterns_by_name() -> None:
    assert parse_pattern("unstructured") == Pattern()
    assert parse_pattern("2:4") == Pattern(1, 4, 2) and Pattern(1, 4, 2).sparsity == 0.5
    assert parse_pattern("4x1") == Pattern(4, 1)
    assert [str(parse_pattern(t)) for t in ("unstructured", "1:8", "1x4")] == [
        "unstructured", "1:8", "1x4",
    ]  # fmt: skip
    for bad in ("4:2", "4:4", "0:4", "0x4", "dense", "2:4:8"):
        with pytest.raises(UserError, match="unknown pattern"):
            parse_pattern(bad)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), min_size=1, max_size=4),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_share_is_exact_whatever_the_ties(
    scores: list[list[int]], share: float, joint: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    given_ = {str(i): torch.tensor(s).double() for i, s in enumerate(scores)}
    gone = {n: torch.rand(len(s), generator=generator) < 0.2 for n, s in given_.items()}
    found = lowest(given_, gone, share, joint=joint)
    parts = [tuple(given_)] if joint else [(n,) for n in given_]
    for names in parts:
        values = torch.cat([given_[n].masked_fill(gone[n], -1) for n in names])
        removed = torch.cat([found[n] for n in names])
        assert int(removed.sum()) == round(share * len(values))
        if removed.any() and not removed.all():
            assert values[removed].max() <= values[~removed].min()
