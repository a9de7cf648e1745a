"""Forecasts against dense derivatives and the change itself; the curvature's known surfaces."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from tiny import images, random_vit
from torch import Tensor, nn

from slimfuse.diagnose.answers import Kind, curved, divergences, losses, rooted, slopes
from slimfuse.diagnose.curvature import (
    Estimate,
    along,
    difference,
    forecast,
    measured,
    scalar_curvature,
)
from slimfuse.diagnose.probing import Patience
from slimfuse.diagnose.rounding import (
    INT4,
    INT8,
    LayerForecast,
    Scheme,
    by_layer,
    dynamic_rounding,
    in_float,
    linear_layers,
    rounding,
)

# torch's own rules of forward mode are compiled on first use
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

KINDS: tuple[Kind, ...] = ("classes", "labels", "numbers")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def goals_of(kind: Kind, rows: Tensor) -> Tensor:
    if kind == "classes":
        return torch.arange(len(rows)) % rows.shape[1]
    drawn = normal(*rows.shape, seed=8)
    return (drawn > 0).double() if kind == "labels" else drawn


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_and_curvatures_are_derivatives(kind: Kind) -> None:
    rows = normal(1, 5, seed=1)
    goals = goals_of(kind, rows)

    def loss(z: Tensor) -> Tensor:
        return losses(kind, z[None], goals)[0]

    dense = torch.func.hessian(loss)(rows[0])
    torch.testing.assert_close(slopes(kind, rows, goals)[0], torch.func.grad(loss)(rows[0]))
    t = normal(1, 5, seed=2)
    torch.testing.assert_close(curved(kind, rows, t)[0], dense @ t[0])
    eye = torch.eye(5, dtype=torch.float64)
    root = torch.stack([rooted(kind, rows, e[None])[0] for e in eye], 1)
    torch.testing.assert_close(root @ root.T, dense)
    # a divergence has the same curvature at its zero
    own = torch.func.hessian(lambda z: divergences(kind, rows, z[None])[0])(rows[0])
    torch.testing.assert_close(own, dense)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_is_the_dense_quadratic(kind: Kind) -> None:
    model, x = net(), normal(7, 4, seed=3)
    goals = goals_of(kind, model(x))
    change = {name: 0.1 * normal(*p.shape, seed=9) for name, p in model.named_parameters()}
    at = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)))(at)
    moved = sum(
        (jacobian[n].flatten(2) @ change[n].flatten() for n in change), torch.zeros(7, 3).double()
    )
    rows, tangents, _ = along(model, (x, None), change)
    torch.testing.assert_close(tangents, moved, rtol=1e-10, atol=1e-12)  # the same sums in float64
    told = forecast(model, [(x[:3], goals[:3]), (x[3:], goals[3:])], change, kind)
    want = (
        (slopes(kind, rows, goals) * moved).sum(1),
        (moved * curved(kind, rows, moved)).sum(1) / 2,
    )
    assert told.linear.value == pytest.approx(float(want[0].mean()), rel=1e-10)
    assert told.quadratic.value == pytest.approx(float(want[1].mean()), rel=1e-10)
    assert told.total.value == pytest.approx(float((want[0] + want[1]).mean()), rel=1e-10)
    assert told.total.error == pytest.approx(float((want[0] + want[1]).std()) / 7**0.5, rel=1e-10)


def test_linear_regression_is_forecast_exactly() -> None:
    torch.manual_seed(1)
    model = nn.Linear(4, 2).double()
    after, x = copy.deepcopy(model), normal(9, 4, seed=4)
    with torch.no_grad():
        for p in after.parameters():
            p.add_(torch.randn_like(p))  # large: nothing but a quadratic is there
    goals = normal(9, 2, seed=5)
    told = forecast(model, [(x, goals)], difference(model, after), "numbers")
    rise, apart, most = measured(model, after, [(x, goals)], "numbers")
    assert told.total.value == pytest.approx(rise.value, rel=1e-12)
    assert told.quadratic.value == pytest.approx(apart.value, rel=1e-12)
    assert most == pytest.approx(float((model(x) - after(x)).detach().abs().max()))


def test_scalar_curvature_of_known_surfaces() -> None:
    """Of a sphere n(n-1)/R², of a plane 0, at a minimum ‖H‖²(PR - 1)."""
    for n, radius in ((2, 1.5), (4, 2.0)):
        at = 0.3 * normal(n, seed=n)

        def height(w: Tensor, r: float = radius) -> Tensor:
            return r - (r**2 - w @ w).sqrt()

        slope, hessian = torch.func.grad(height)(at), torch.func.hessian(height)(at)
        assert scalar_curvature(slope, hessian) == pytest.approx(n * (n - 1) / radius**2, rel=1e-10)
    assert scalar_curvature(normal(3, seed=1), torch.zeros(3, 3)) == 0
    root = normal(4, 4, seed=2)
    h = root @ root.T
    ratio = float(h.trace() ** 2 / (h * h).sum())
    assert scalar_curvature(torch.zeros(4), h) == pytest.approx(
        float((h * h).sum()) * (ratio - 1), rel=1e-12
    )


def test_probes_estimate_the_quadratic_of_every_layer() -> None:
    """Rounded weights alone are a change of the weights, whose quadratic is known exactly."""
    model, x = random_vit(hidden_size=6, num_attention_heads=2, intermediate_size=5), images(6)
    layers = dict(list(linear_layers(model).items())[:3])
    change = {f"{name}.weight": rounding(layer.weight, 4) for name, layer in layers.items()}
    told = {n: forecast(model, [(x, None)], {n: d}, "classes").quadratic for n, d in change.items()}
    whole = forecast(model, [(x, None)], change, "classes").quadratic.value
    singles = [(x[i : i + 1], None) for i in range(len(x))]
    scheme = {"int4": Scheme(lambda w: rounding(w, 4))}
    found, every = by_layer(model, singles, layers, scheme, "classes", probes=50)
    for one in found:
        cost = one.costs["int4"]
        assert abs(cost.value - told[f"{one.layer}.weight"].value) < 5 * cost.error
        assert cost.error < 0.3 * cost.value
    assert abs(every["int4"].value - whole) < 5 * every["int4"].error


class Rounded(nn.Module):
    """A layer that computes as a scheme says."""

    def __init__(self, layer: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.layer, self.scheme = layer, scheme

    def forward(self, x: Tensor) -> Tensor:
        rows, w = x.flatten(0, -2), self.layer.weight
        y = (rows + self.scheme.inputs(rows)) @ (w + self.scheme.weights(w)).T + self.layer.bias
        return y.unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("scheme", [INT8, INT4])
def test_rounded_products_cost_what_their_forecast_says(scheme: Scheme) -> None:
    model, x = random_vit(), images(16)
    name = "vit.layers.1.mlp.fc1"
    layer = linear_layers(model)[name]
    singles = [(x[i : i + 1], None) for i in range(len(x))]
    found, _ = by_layer(model, singles, {name: layer}, {"it": scheme}, "classes", probes=10)
    after = copy.deepcopy(model)
    after.set_submodule(name, Rounded(after.get_submodule(name), scheme))
    truth = measured(model, after, singles, "classes")[1].value
    cost = found[0].costs["it"]
    assert abs(cost.value - truth) < 5 * cost.error + 0.1 * cost.value
    assert cost.error < 0.2 * cost.value


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    layer = nn.Linear(4, 4).double()
    twice, x = nn.Sequential(layer, nn.Tanh(), layer), normal(1, 4, seed=3)
    change = {"0.weight": rounding(layer.weight, 4)}
    told = forecast(twice, [(x, None)], change, "numbers").quadratic.value
    singles, scheme = [(x, None)] * 2, {"it": Scheme(lambda w: rounding(w, 4))}
    found, _ = by_layer(twice, singles, {"0": layer}, scheme, "numbers", probes=200)
    assert abs(found[0].costs["it"].value - told) < 5 * found[0].costs["it"].error


def test_dynamic_rounding_is_onnx_s() -> None:
    """Against the operator's own implementation, and zero stays zero."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, None)],
        [value("y", TensorProto.UINT8, None), value("s", TensorProto.FLOAT, None),
         value("z", TensorProto.UINT8, None)],
    )  # fmt: skip
    operator = ReferenceEvaluator(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    )
    for seed, shift in enumerate((0.0, 3.0, -3.0)):
        x = (normal(5, 7, seed=seed) + shift).float()
        x[0, 0] = 0
        y, s, z = operator.run(None, {"x": x.numpy()})
        want = torch.from_numpy((y.astype("float64") - float(z)) * float(s)) - x.double()
        torch.testing.assert_close(dynamic_rounding(x).double(), want, rtol=0, atol=1e-6)
        assert float(dynamic_rounding(x)[0, 0]) == 0


def test_a_forecast_of_rounding_is_near_the_truth() -> None:
    model, x = random_vit(), images(10)
    after = copy.deepcopy(model)
    with torch.no_grad():
        for p in after.parameters():
            if p.ndim == 2:
                p.add_(rounding(p, 8))
    told = forecast(model, [(x, None)], difference(model, after), "classes").quadratic.value
    _, apart, _ = measured(model, after, [(x, None)], "classes")
    assert told == pytest.approx(apart.value, rel=0.1)  # third order of a change of 1 %


@pytest.mark.parametrize("block", [None, 3])
def test_rounding_stays_within_half_a_step(block: int | None) -> None:
    weight = normal(4, 7, seed=6)
    gap = rounding(weight, 4, block)
    parts = [weight] if block is None else weight.split(block, 1)
    steps = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) / 7 for p in parts], 1)
    assert bool((gap.abs() <= steps / 2 + 1e-15).all()) and bool(gap.any())
    levels = (weight + gap) / steps
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-12)


def test_the_list_of_what_stays_in_float() -> None:
    def one(name: str, cost: float, numbers: int) -> LayerForecast:
        return LayerForecast(name, {"int8": Estimate(cost, 0, 9)}, numbers)

    found = [one("a", 0.5, 100), one("b", 0.4, 10), one("c", 0.1, 1000)]
    assert in_float(found, "int8", 2.0) == ((), pytest.approx(1.0))
    assert in_float(found, "int8", 0.6) == (("b",), pytest.approx(0.6))  # dearer by number than a
    assert in_float(found, "int8", 0.1)[0] == ("b", "a")
    # greedy by cost a number keeps no more numbers in float than any smaller list would need
    kept = set(in_float(found, "int8", 0.55)[0])
    enough = [
        set(group) for k in range(4) for group in combinations("abc", k)
        if sum(f.costs["int8"].value for f in found if f.layer not in group) <= 0.55
    ]  # fmt: skip
    assert kept in enough


def test_time_ends_work_but_not_before_two_samples() -> None:
    assert list(Patience(0.0).over(range(9))) == [0, 1]
    assert list(Patience(None).over(range(9))) == list(range(9))
