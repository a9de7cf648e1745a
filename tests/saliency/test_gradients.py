"""Gradients against ordinary backward passes, and their streamed sums against whole ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saliency.small_nets import Pair, loss, mlp, pairs, rows, singles
from torch import Tensor, nn

from slimfuse.errors import SlimfuseError
from slimfuse.saliency.fisher import HELD, Part, Sums, accumulate, plan
from slimfuse.saliency.gradients import count_rows, drawn, gradients
from slimfuse.saliency.inverse import Route, invert
from slimfuse.saliency.patterns import Layer, Pattern, prunable

SUMS = {"rtol": 1e-10, "atol": 1e-14}  # float64 sums of at most 80 products in another order
MODES = st.sampled_from(["gram", "samples", "diagonal"])


class Attends(nn.Module):
    """One head of attention by the stock kernel, and dropout that mustn't act."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(4, 12).double(), nn.Linear(4, 3).double()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        result: Tensor = self.out(self.drop(seen[:, 0].mean(1)))
        return result


def joined(stream: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = list(stream)
    return {name: torch.cat([g[name] for g in found]) for name in found[0]}


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_samples_one_by_one_or_together(kind: str) -> None:
    model: nn.Module = mlp(4, 5, 3) if kind == "mlp" else Attends()
    x, y = pairs(7, 4, 3)
    if kind == "attention":
        x = torch.stack([x, x.flip(0), x.square()], 1)
    names = [name for name, _ in model.named_parameters()]
    one = joined(gradients(model, loss, singles((x, y)), names))
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    together = joined(gradients(model, loss, parts, names, per_sample=True))
    assert count_rows(singles((x, y))) == count_rows(parts, per_sample=True) == 7
    model.eval()
    for n in range(7):
        model.zero_grad()
        loss(model, (x[n : n + 1], y[n : n + 1])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            for found in (one, together):
                torch.testing.assert_close(found[name][n], parameter.grad, **SUMS)
                assert not found[name].requires_grad


def test_a_micro_batch_is_one_sample() -> None:
    model, data = mlp(4, 5, 3), pairs(6, 4, 3)
    halves = [(data[0][:3], data[1][:3]), (data[0][3:], data[1][3:])]
    (name,) = [layer.name for layer in prunable(model)][:1]
    found = joined(gradients(model, loss, halves, [name]))[name]
    each = joined(gradients(model, loss, singles(data), [name]))[name]
    torch.testing.assert_close(found, torch.stack([each[:3].mean(0), each[3:].mean(0)]), **SUMS)


def test_the_model_is_left_as_it_was() -> None:
    model = Attends().train()
    model.out.eval()
    model.qkv.weight.requires_grad_(False)
    data = (torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0, 2]))
    before = torch.get_rng_state()
    stream = gradients(model, loss, singles(data), ["qkv.weight", "out.weight"])
    next(stream)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        next(stream)  # whoever asks decides nothing
    stream.close()
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and model.drop.training and not model.out.training
    assert not model.qkv.weight.requires_grad and model.out.weight.requires_grad
    assert model.out.weight.grad is None


def test_what_the_loss_does_not_see_has_no_gradient() -> None:
    model = nn.ModuleDict({"used": mlp(4, 3), "idle": mlp(4, 3)})
    data = pairs(2, 4, 3)
    found = joined(
        gradients(model, lambda m, b: loss(m["used"], b), singles(data), ["idle.0.weight"])
    )
    assert not found["idle.0.weight"].any()


def test_drawn_labels_are_the_same_in_every_pass_and_follow_the_model() -> None:
    model = mlp(4, 3)
    x, _ = pairs(1, 4, 3)
    many = [(x.expand(8000, 4), torch.zeros(8000).long())]
    ask = drawn(lambda m, b: m(b[0]))
    name = "0.weight"
    first, again = (
        joined(gradients(model, ask, many, [name], per_sample=True))[name] for _ in range(2)
    )
    assert torch.equal(first, again)
    other = joined(gradients(model, ask, many, [name], per_sample=True, seed=1))[name]
    assert not torch.equal(first, other)
    # of softmax regression the true Fisher is (diag p − ppᵀ) ⊗ xxᵀ
    p = model(x).detach().softmax(-1)[0]
    truth = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x[0], x[0]))
    flat = first.flatten(1)
    found = flat.T @ flat / len(flat)
    # 8 000 draws: five standard errors of a frequency, 5·½/√8000, times the largest x²
    assert (found - truth).abs().max() < 0.03 * float(x.square().max())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 80), st.integers(1, 13), st.integers(1, 4000), MODES)
def test_streamed_sums_are_the_whole_ones(
    samples: int, block: int, memory: int, route: Route
) -> None:
    model, data = mlp(4, 5, 3), pairs(samples, 4, 3)
    layers = prunable(model)
    passes = plan(layers, block, samples, route, memory=memory, itemsize=8)
    for layer in layers:
        x = rows(model, data, layer)
        whole = invert(x, block, 0.1, route=route)
        parts = [part for group in passes for part in group if part.layer == layer]
        edges = [(p.start, p.stop) for p in parts]
        assert edges[0][0] == 0 and edges[-1][1] == whole.shape[0]
        assert all(a[1] == b[0] for a, b in pairwise(edges))
        for part in parts:
            sums = Sums(part, route, first=True)
            for chunk in x.split(3):
                sums.add(chunk)
            sums.finish()
            assert sums.mean_diagonal == pytest.approx(float(x.square().mean()), rel=1e-12)
            torch.testing.assert_close(sums.mean_gradient(), x.mean(0)[part.weights], **SUMS)
            found = sums.inverse(slice(0, part.stop - part.start), 0.1)
            own = whole.select(torch.arange(part.start, part.stop))
            torch.testing.assert_close(found.dense(), own.dense(), **SUMS)
            torch.testing.assert_close(found.curvature(), own.curvature(), **SUMS)


def test_passes_stay_within_their_memory() -> None:
    layers = [Layer(f"l{i}", (7, n), 1) for i, n in enumerate((11, 50, 3, 200))]
    memory = 60_000
    passes = plan(layers, 10, 99, "gram", memory=memory, itemsize=4)
    for parts in passes:
        assert sum((p.stop - p.start) * 10 * (10 + HELD) * 4 for p in parts) <= memory
    assert len(passes) > 2
    assert len(plan(layers, 10, 99, "gram", memory=10**9, itemsize=4)) == 1


def test_shards_of_several_processes_add_up() -> None:
    model, data = mlp(4, 5, 3), pairs(70, 4, 3)
    parts = [Part(layer, 6, 0, -(-layer.size // 6)) for layer in prunable(model)]
    whole = accumulate(model, loss, singles(data), parts, "gram", first=True)
    shards: list[Pair] = [(data[0][:30], data[1][:30]), (data[0][30:], data[1][30:])]
    told: list[list[Tensor]] = []
    for shard in shards:  # what each process would hand to the all-reduce, in order
        seen: list[Tensor] = []

        def note(t: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(t.clone())
            return t

        accumulate(model, loss, singles(shard), parts, "gram", first=True, reduce=note)
        told.append(seen)
    totals = iter([a + b for a, b in zip(*told, strict=True)])
    found = accumulate(model, loss, singles(shards[0]), parts, "gram", first=True,
                       reduce=lambda _: next(totals))  # fmt: skip
    for key, sums in whole.items():
        assert found[key].count == sums.count == 70
        assert found[key].mean_diagonal == pytest.approx(sums.mean_diagonal, rel=1e-12)
        torch.testing.assert_close(found[key].mean_gradient(), sums.mean_gradient(), **SUMS)
        a, b = (s.inverse(slice(0, 2), 0.1).dense() for s in (found[key], sums))
        torch.testing.assert_close(a, b, **SUMS)


@pytest.mark.parametrize("route", ["gram", "samples", "diagonal"])
def test_gradients_follow_the_order_of_the_pattern(route: Route) -> None:
    model, data = mlp(6, 4, 3), pairs(30, 6, 3)
    layer, pattern = prunable(model)[0], Pattern(2, 3)
    x = pattern.flat(layer, rows(model, data, layer).view(-1, *layer.shape))
    part = Part(layer, 12, 0, 2)
    sums = accumulate(model, loss, singles(data), [part], route, pattern=pattern)[part.key]
    expected = invert(x, 12, 0.1, route=route)
    torch.testing.assert_close(sums.inverse(slice(0, 2), 0.1).dense(), expected.dense(), **SUMS)


def test_half_precision_is_summed_in_float32() -> None:
    part = Part(Layer("l", (2, 2), 1), 4, 0, 1)
    sums = Sums(part, "gram")
    for _ in range(3):
        sums.add(torch.full((1, 4), 300.0, dtype=torch.float16))  # 300² overflows float16
    sums.finish()
    assert sums.mean_diagonal == 90_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("route", ["gram", "samples", "diagonal"])
def test_a_gradient_that_is_not_finite_is_an_error(route: Route, bad: float) -> None:
    sums = Sums(Part(Layer("block.weight", (2, 2), 1), 4, 0, 1), route)
    sums.add(torch.tensor([[1.0, 2.0, bad, 0.0]]))
    with pytest.raises(SlimfuseError, match=r"block\.weight is not finite"):
        sums.finish()


def test_no_gradient_is_an_error() -> None:
    layer = prunable(mlp(4, 3))[0]
    nothing: list[Any] = []
    with pytest.raises(SlimfuseError, match="no gradient"):
        accumulate(mlp(4, 3), loss, nothing, [Part(layer, 4, 0, 3)], "gram")
