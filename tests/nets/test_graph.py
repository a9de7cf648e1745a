"""Nets of odd structure: what can be followed, what is refused, and saved folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets.random_nets import CONFIGS, each_net, images, outputs, random_net
from torch import Tensor, nn

from slimfuse.errors import ParentError, ShapeError
from slimfuse.nets import (
    VGGConfig,
    build,
    graph_of,
    load,
    load_config,
    narrow,
    save,
)


class Net(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, last: int = 6) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 6), nn.Linear(last, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Unused(Net):
    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.spare = Scale()


class Branches(nn.Module):
    """Two layers side by side, as in a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 5)
        self.last = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


class Grouped(nn.ReLU):
    num_key_value_groups = 2


def test_a_vector_between_layers_moves_with_its_units() -> None:
    graph = graph_of(Net(nn.Sequential(Scale(), nn.ReLU(), nn.LayerNorm(6))), torch.randn(2, 4))
    assert graph.atlas.axes["between.0.gain"] == graph.atlas.axes["first.bias"]
    assert graph.atlas.axes["between.2.weight"] == graph.atlas.axes["first.bias"]


def test_a_space_read_twice_has_a_flattened_axis() -> None:
    graph = graph_of(Net(lambda x: torch.cat([x, x.relu()], 1), last=12), torch.randn(2, 4))
    assert [leg.space for leg in graph.atlas.axes["last.weight"][1]] == ["size.2", "units.first"]


def test_a_depthwise_convolution_moves_with_its_units() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.ReLU(),
        nn.ConvTranspose2d(5, 4, 2), nn.PReLU(), nn.Flatten(), nn.Linear(100, 3),
    )  # fmt: skip
    graph = graph_of(net, torch.randn(2, 1, 8, 8))
    first = graph.atlas.axes["0.bias"][0]
    assert [w.module for w in graph.writers["units.0"]] == ["0"]
    assert graph.atlas.axes["2.weight"][0] == graph.atlas.axes["3.running_var"][0] == first
    assert graph.atlas.axes["5.weight"][1] == graph.atlas.axes["5.bias"][0]
    # torch-pruning loses the flattening behind a shared slope; the axis has 25 positions a unit
    assert [leg.space for leg in graph.atlas.axes["8.weight"][1]] == ["units.5", "size.25"]


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (Net(Conv1D()), "between.weight: parameter of a Conv1D"),
        (Net(Grouped()), "between: Grouped with grouped queries"),
        (Unused(), "spare.gain: has no legs"),
        (Net(nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 6, 1, groups=3), nn.Flatten())),
         "between.1: Conv1d with 3 groups"),
        (Net(lambda x: x * torch.arange(6).to(x)), "aren't interchangeable"),
        (Branches(), "last: holds units.left among others"),
        (Net(nn.GroupNorm(2, 6)), "aren't interchangeable"),
        (Net(lambda x: x.cumsum(1)), "aren't interchangeable"),
        (Net(lambda x: x, last=5), "doesn't run on the example"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named(net: nn.Module, told: str) -> None:
    with pytest.raises(ParentError, match=told):
        graph_of(net, torch.randn(2, 4))


@each_net
def test_a_saved_net_is_built_again(name: str, tmp_path: Path) -> None:
    config = narrow(CONFIGS[name], 0.6)
    net = random_net(config)
    save(net, config, tmp_path / "net")
    assert load_config(tmp_path / "net") == config
    again = load(tmp_path / "net")
    assert {k: v.dtype for k, v in again.state_dict().items()} == {
        k: v.dtype for k, v in net.state_dict().items()
    }
    assert torch.equal(outputs(again, images(config)), outputs(net, images(config)))


def test_a_damaged_folder_is_told(tmp_path: Path) -> None:
    config = CONFIGS["mlp"]
    save(random_net(config), narrow(config, [7, 4]), tmp_path)
    with pytest.raises(ParentError, match="don't fit the net's config"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ParentError, match="don't fit the net's config"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "brt"}')
    with pytest.raises(ParentError, match="no saved net"):
        load(tmp_path)


def test_illegal_widths_are_refused() -> None:
    assert narrow(CONFIGS["vgg"], 0.5).widths == (2, 2, 4, 3)
    assert narrow(CONFIGS["resnet"], CONFIGS["resnet"].widths) == CONFIGS["resnet"]
    for widths in ([7], [7, 0]):
        with pytest.raises(ShapeError, match="2 positive widths"):
            narrow(CONFIGS["mlp"], widths)
    with pytest.raises(ShapeError, match="3 poolings of 7 pixels"):
        build(VGGConfig(1, 7, (3, "M", "M", "M")))
