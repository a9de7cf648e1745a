"""Any traceable net: spaces from torch-pruning and fusion by transport."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets.random_nets import CONFIGS, each_net, images, outputs, random_net
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from slimfuse.errors import DataError, ParentError, ShapeError
from slimfuse.nets import (
    Config,
    MLPConfig,
    build,
    fuse_nets,
    graph_of,
    narrow,
    reestimate,
    vanilla,
)
from slimfuse.nets.graph import floating
from slimfuse.spaces import LinearMap, transform
from slimfuse.transport import Solver

EXACT = {"rtol": 1e-8, "atol": 1e-8}  # float64; exact plans only reorder sums
each_cost = pytest.mark.parametrize("cost", ["activations", "weights"])


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
