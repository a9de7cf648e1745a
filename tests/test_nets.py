"""Any traceable net: spaces from torch-pruning, OT fusion, and the small architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from slimfuse.errors import DataError, ParentError, ShapeError
from slimfuse.nets import (
    Config,
    MLPConfig,
    ResNetConfig,
    VGGConfig,
    build,
    fuse_nets,
    graph_of,
    load,
    load_config,
    narrow,
    reestimate,
    save,
    vanilla,
)
from slimfuse.nets.graph import floating
from slimfuse.spaces import LinearMap, transform
from slimfuse.transport import Solver

EXACT = {"rtol": 1e-8, "atol": 1e-8}  # float64; exact plans only reorder sums
CONFIGS: dict[str, Config] = {
    "mlp": MLPConfig(12, (7, 5), 3),
    "vgg": VGGConfig(1, 8, (3, "M", 5, 7, "M"), (6,), 4),
    "vgg-bn": VGGConfig(2, 9, (3, "M", 5, "M"), (), 3, batch_norm=True),
    "resnet": ResNetConfig(1, (4, 6), (1, 2), (5, 3, 7), 3),
}
each_net = pytest.mark.parametrize("name", CONFIGS)
each_cost = pytest.mark.parametrize("cost", ["activations", "weights"])


def images(config: Config, count: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(config, MLPConfig):
        shape: tuple[int, ...] = (count, 1, 3, config.inputs // 3)
    else:
        side = config.image_size if isinstance(config, VGGConfig) else 8
        shape = (count, config.channels, side, side)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_net(config: Config, seed: int = 0) -> nn.Module:
    """A float64 net with random weights, gains, biases and statistics."""
    torch.manual_seed(seed)
    net = build(config).double()
    with torch.no_grad():
        for name, value in floating(net.state_dict()).items():
            if value.ndim == 1:
                centred = name.endswith(("bias", "running_mean"))
                value.copy_(torch.rand_like(value) + (-0.5 if centred else 0.5))
    return net


def outputs(net: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(inputs)


def moved(
    net: nn.Module, config: Config, target: Config, make: Callable[[int], LinearMap]
) -> nn.Module:
    """Return a net of the shape `target`: `net` with each free space moved by make(size)."""
    atlas = graph_of(net, images(config, 2)).atlas
    maps = {space: make(atlas.spaces[space].size) for space in atlas.free}
    copied = build(target).double()
    copied.load_state_dict(net.state_dict() | transform(net.state_dict(), atlas, maps))
    return copied


def shuffled(net: nn.Module, config: Config) -> nn.Module:
    torch.manual_seed(7)

    def make(size: int) -> LinearMap:
        matrix = torch.eye(size, dtype=torch.float64)[torch.randperm(size)]
        return LinearMap(matrix, matrix)

    return moved(net, config, config, make)


def widened(net: nn.Module, config: Config) -> nn.Module:
    """Return a net with every unit twice, in random order, each read with half the weight."""
    torch.manual_seed(8)

    def make(size: int) -> LinearMap:
        twice = torch.eye(size, dtype=torch.float64).repeat(1, 2)[:, torch.randperm(2 * size)]
        return LinearMap(twice, twice / 2)

    return moved(net, config, narrow(config, 2.0), make)


def fused(config: Config, *args: Any, **options: Any) -> nn.Module:
    target = build(config).double()
    fuse_nets(*args, target, [images(config), images(config, 40, 1)], **options)
    return target


@each_net
def test_the_atlas_covers_everything_and_lists_the_widths_in_order(name: str) -> None:
    config = CONFIGS[name]
    net = build(config)
    atlas = graph_of(net, images(config, 2).float()).atlas
    assert set(atlas.axes) == set(floating(net.state_dict()))
    assert tuple(atlas.spaces[s].size for s in atlas.free) == config.widths


def test_a_flattened_convolution_is_read_unit_by_unit() -> None:
    config = CONFIGS["vgg"]
    axes = graph_of(build(config), images(config, 2).float()).atlas.axes
    legs = [[leg.role.value + leg.space for leg in axis] for axis in axes["classifier.0.weight"]]
    assert legs == [["^units.classifier.0"], ["_units.features.5", "=size.4"]]


def test_a_stage_of_a_resnet_is_one_space() -> None:
    config = CONFIGS["resnet"]
    graph = graph_of(build(config), images(config, 2).float())
    stages = [[w.site for w in ws] for ws in graph.writers.values() if len(ws) > 1]
    assert stages == [
        ["bn1", "stages.0.0.bn2"],
        ["stages.1.0.bn2", "stages.1.0.shortcut.1", "stages.1.1.bn2"],
    ]


def test_tracing_leaves_the_model_alone() -> None:
    net = build(CONFIGS["vgg-bn"]).train().requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    graph_of(net, images(CONFIGS["vgg-bn"], 2).float())
    assert net.training and not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@each_net
@each_cost
def test_a_permuted_copy_is_undone(name: str, cost: Any) -> None:
    config = CONFIGS[name]
    net = random_net(config)
    other = shuffled(net, config)
    x = images(config, 9, 5)
    torch.testing.assert_close(outputs(other, x), outputs(net, x), **EXACT)
    child = fused(config, [net, other], None, cost=cost, recalibrate=False)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(child.state_dict()[key], value, **EXACT)
    vanilla([net, other], child)
    assert (outputs(child, x) - outputs(net, x)).abs().max() > 1e-2  # the order did matter


@each_net
@each_cost
def test_a_widened_copy_narrows_back(name: str, cost: Any) -> None:
    config = CONFIGS[name]
    net = random_net(config)
    wide = widened(net, config)
    x = images(config, 9, 5)
    torch.testing.assert_close(outputs(wide, x), outputs(net, x), **EXACT)
    # the anchor only guides: its own weights don't enter
    child = fused(config, [wide], net, cost=cost, weights=[1, 0], recalibrate=False)
    for key, value in floating(net.state_dict()).items():
        torch.testing.assert_close(child.state_dict()[key], value, **EXACT)


@each_net
def test_a_net_fused_with_itself_is_itself(name: str) -> None:
    config = CONFIGS[name]
    net = random_net(config)
    x = images(config, 9, 5)
    child = fused(config, [net, net, net, net], None, weights=[1, 2, 3, 4], recalibrate=False)
    torch.testing.assert_close(outputs(child, x), outputs(net, x), **EXACT)


def by_hand(a: nn.Module, b: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    """OTFusion of two equal MLPs by numpy and scipy: assignment by correlation, then the mean."""
    first, second = ({k: v.numpy() for k, v in n.state_dict().items()} for n in (a, b))
    layers = [k.removesuffix(".weight") for k in first if k.endswith("weight")]
    state, before = {}, np.arange(first[f"{layers[0]}.weight"].shape[1])
    h, g = x.flatten(1).numpy(), x.flatten(1).numpy()
    for layer in layers:
        w, v = first[f"{layer}.weight"], second[f"{layer}.weight"]
        c, d = first[f"{layer}.bias"], second[f"{layer}.bias"]
        h, g = h @ w.T + c, g @ v.T + d
        order = np.arange(len(w))
        if layer != layers[-1]:
            order = linear_sum_assignment(-np.corrcoef(h.T, g.T)[: len(w), len(w) :])[1]
        state[f"{layer}.weight"] = (w + v[order][:, before]) / 2
        state[f"{layer}.bias"] = (c + d[order]) / 2
        h, g, before = np.maximum(h, 0), np.maximum(g, 0), order
    return state


def test_two_mlps_fuse_as_by_hand() -> None:
    config = CONFIGS["mlp"]
    a, b = random_net(config, 1), random_net(config, 2)
    x = images(config)
    child = build(config).double()
    result = fuse_nets([a, b], None, child, [x[:13], x[13:]])
    for key, value in by_hand(a, b, x).items():
        np.testing.assert_allclose(child.state_dict()[key].numpy(), value, rtol=1e-10, atol=1e-12)
    assert result.weights == (0.5, 0.5)
    assert list(result.maps[0]) == ["units.layers.0", "units.layers.2"]


def test_a_soft_plan_mixes_units() -> None:
    config = CONFIGS["mlp"]
    a, b = random_net(config, 1), random_net(config, 2)
    solver = Solver(kind="sinkhorn", reg=0.5)
    result = fuse_nets([a, b], None, build(config), [images(config)], solver=solver)
    # float32 target, float64 plans
    assert all(m.effective_units > 1.5 for m in result.maps[0].values())


def pruned(net: nn.Module, config: Config, ratio: float = 0.5) -> nn.Module:
    import torch_pruning as tp

    slim = copy.deepcopy(net)
    last = [m for m in slim.modules() if isinstance(m, nn.Linear)][-1]
    tp.pruner.MagnitudePruner(
        slim,
        images(config, 2),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=[last],
        forward_fn=lambda m, x: m(x),
    ).step()
    return slim


@each_net
def test_a_pruned_net_is_fused_with_its_dense_parent(name: str) -> None:
    config = CONFIGS[name]
    net = random_net(config)
    slim = pruned(net, config)
    atlas = graph_of(slim, images(config, 2)).atlas
    smaller = narrow(config, [atlas.spaces[s].size for s in atlas.free])
    assert all(a < b for a, b in zip(smaller.widths, config.widths, strict=True))
    child = fused(smaller, [net], slim)  # the config describes the pruned net, so it loads
    assert torch.isfinite(outputs(child, images(config, 3))).all()


def test_activations_in_place_change_nothing() -> None:
    config = CONFIGS["vgg-bn"]
    a, b = random_net(config, 1), random_net(config, 2)
    plain = fused(config, [a, b], None)
    for module in (*a.modules(), *b.modules()):
        if isinstance(module, nn.ReLU):
            module.inplace = True
    in_place = fused(config, [a, b], None)
    for key, value in plain.state_dict().items():
        assert torch.equal(in_place.state_dict()[key], value)


def test_statistics_are_those_of_the_batches() -> None:
    config = CONFIGS["vgg-bn"]
    net = random_net(config)
    batches = [images(config, 11), images(config, 11, 1)]
    reestimate(net, batches)
    first = net.get_submodule("features.0")
    rows = [first(b).detach().movedim(1, -1).flatten(0, -2) for b in batches]
    norm = net.get_submodule("features.1")
    torch.testing.assert_close(norm.running_mean, torch.stack([r.mean(0) for r in rows]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([r.var(0) for r in rows]).mean(0))
    assert not norm.training and norm.momentum == 0.1


def test_vanilla_is_the_plain_mean_and_refuses_other_shapes() -> None:
    config = CONFIGS["mlp"]
    a, b, child = random_net(config, 1), random_net(config, 2), build(config).double()
    vanilla([a, b], child, weights=[1, 3])
    for key, value in child.state_dict().items():
        torch.testing.assert_close(value, (a.state_dict()[key] + 3 * b.state_dict()[key]) / 4)
    with pytest.raises(ShapeError, match=r"layers.0.weight: \(7, 12\) and \(14, 12\)"):
        vanilla([a, random_net(narrow(config, 2.0))], child)


def test_what_does_not_fit_is_told() -> None:
    config = CONFIGS["mlp"]
    net, x = random_net(config), images(config)
    wide = random_net(narrow(config, 2.0))
    with pytest.raises(ShapeError, match="has not the anchor's shape"):
        fuse_nets([net, wide], None, wide, [x])
    with pytest.raises(DataError, match="0 batches"):
        fuse_nets([net], None, net, [])
    with pytest.raises(ParentError, match="2 weights"):
        fuse_nets([net, net], None, build(config), [x], weights=[1])
    with pytest.raises(ParentError, match="differ in more than the widths") as told:
        fuse_nets([net, random_net(MLPConfig(12, (7, 5, 4), 3))], None, build(config), [x])
    assert "parent 2" in str(told.value) and "layers.6.weight" in str(told.value)
    with pytest.raises(ParentError, match=r"outputs.layers.4: 6 and 3"):
        fuse_nets([random_net(MLPConfig(12, (7, 5), 6))], net, build(config), [x])


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
