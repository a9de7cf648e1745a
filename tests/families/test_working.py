"""Working forms compute what the stock modules do, and turn back into them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimfuse.families.working import (
    SplitLinear,
    conv1d_of,
    linear_of,
    merge_linear,
    split_linear,
)

SAME = {"rtol": 0, "atol": 0}  # the same numbers
ROUNDED = {"rtol": 0, "atol": 1e-14}  # float64: products of other sizes sum in another order
NAMES = ("q", "k", "v")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stock(bias: bool = True) -> nn.Linear:
    linear = nn.Linear(7, 15, bias=bias).double()
    with torch.no_grad():
        for seed, p in enumerate(linear.parameters()):
            p.copy_(numbers(*p.shape, seed=seed))
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [None, (8, 4, 3)])
def test_the_parts_give_the_outputs_of_the_one_layer(
    bias: bool, sizes: tuple[int, ...] | None
) -> None:
    whole, x = stock(bias), numbers(2, 3, 7, seed=9)
    parts = split_linear(whole.weight, whole.bias, NAMES, sizes)
    torch.testing.assert_close(parts(x), whole(x), **ROUNDED)
    assert (parts.in_features, parts.out_features) == (7, 15)
    kinds = ("weight", "bias") if bias else ("weight",)
    assert list(parts.state_dict()) == [f"{n}.{kind}" for n in NAMES for kind in kinds]
    assert [part.out_features for part in parts.parts] == list(sizes or (5, 5, 5))


@pytest.mark.parametrize("bias", [True, False])
def test_what_was_split_merges_into_the_same_numbers(bias: bool) -> None:
    whole = stock(bias)
    weight, found = merge_linear(split_linear(whole.weight, whole.bias, NAMES))
    torch.testing.assert_close(weight, whole.weight.detach(), **SAME)
    assert (found is None) is not bias
    if found is not None:
        torch.testing.assert_close(found, whole.bias.detach(), **SAME)


def test_sizes_that_leave_rows_over_are_a_fault() -> None:
    whole = stock()
    with pytest.raises(AssertionError, match="make up"):
        split_linear(whole.weight, whole.bias, ("q", "k"))


def test_the_parts_are_parameters_of_their_own() -> None:
    """Training one part leaves the others, and the state loads strictly."""
    whole = stock()
    parts = split_linear(whole.weight, whole.bias, NAMES)
    parts(numbers(2, 7)).sum().backward()
    before = {name: p.detach().clone() for name, p in parts.named_parameters()}
    with torch.no_grad():
        parts.get_parameter("k.weight").sub_(1)
    changed = {n for n, p in parts.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"k.weight"}
    parts.load_state_dict(before)
    torch.testing.assert_close(merge_linear(parts)[1], whole.bias.detach(), **SAME)


def test_a_conv1d_is_a_linear_layer_of_the_transpose() -> None:
    conv, x = Conv1D(15, 7).double(), numbers(2, 3, 7)
    with torch.no_grad():
        conv.bias.copy_(numbers(15, seed=3))
    linear = linear_of(conv)
    assert (linear.in_features, linear.out_features) == (7, 15)
    torch.testing.assert_close(linear(x), conv(x), **ROUNDED)
    back = conv1d_of(linear)
    assert (back.nf, back.nx) == (15, 7)
    torch.testing.assert_close(back.state_dict(), conv.state_dict(), **SAME)
    torch.testing.assert_close(back(x), conv(x), **SAME)


def test_a_fused_conv1d_splits_and_merges() -> None:
    conv, x = Conv1D(15, 7).double(), numbers(4, 7)
    linear = linear_of(conv)
    parts = split_linear(linear.weight, linear.bias, NAMES)
    torch.testing.assert_close(parts(x), conv(x), **ROUNDED)
    torch.testing.assert_close(conv1d_of(parts).state_dict(), conv.state_dict(), **SAME)


def test_a_layer_without_bias_becomes_a_conv1d_with_zeros() -> None:
    whole, x = stock(bias=False), numbers(4, 7)
    conv = conv1d_of(whole)
    assert not conv.bias.any()
    torch.testing.assert_close(conv(x), whole(x), **ROUNDED)


def test_shapes_are_known_without_memory() -> None:
    with torch.device("meta"):
        conv = Conv1D(15, 7)
    linear = linear_of(conv)
    parts = split_linear(linear.weight, linear.bias, NAMES)
    assert {p.device.type for p in parts.parameters()} == {"meta"}
    weight, bias = merge_linear(parts)
    assert weight.shape == (15, 7) and bias is not None and bias.shape == (15,)
    assert conv1d_of(parts).weight.shape == (7, 15)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the exporter's own, of its tree specs
def test_the_graph_of_the_parts_gives_their_outputs(tmp_path: Path) -> None:
    import onnxruntime

    whole = stock()
    model = split_linear(whole.weight, whole.bias, NAMES).float().eval()
    assert isinstance(model, SplitLinear)
    file = tmp_path / "split.onnx"
    torch.onnx.export(
        model,
        (torch.zeros(2, 7),),
        file,
        input_names=["x"],
        dynamic_shapes={"x": {0: torch.export.Dim("n")}},
        opset_version=20,
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = numbers(5, 7).float()
    (found,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():  # float32, sums of 7 terms of order 1
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=0, atol=1e-5)
