"""How far WoodTaylor goes along −h: the minimum of a quadratic model of the whole loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from saliency.small_nets import loss, mlp, pairs, rows, singles
from torch import Tensor, nn

from slimfuse.saliency import sparsify as driver
from slimfuse.saliency.inverse import Damping
from slimfuse.saliency.patterns import prunable
from slimfuse.saliency.sparsify import sparsify
from slimfuse.saliency.sparsify_spec import Spec
from slimfuse.saliency.step_length import step_length

LAMBDA = 1e-3


def drawn(samples: int, *widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, w, generator=generator, dtype=torch.float64) for w in widths]


def newton_of(block: Tensor) -> Tensor:
    fisher = block.T @ block / len(block) + LAMBDA * torch.eye(block.shape[1]).double()
    return torch.linalg.solve(fisher, block.mean(0))


class Weights(nn.Module):
    """A model of named parameters, whose gradients a test makes up."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        for name, width in widths.items():
            self.register_parameter(name, nn.Parameter(torch.ones(width, dtype=torch.float64)))


@pytest.mark.parametrize("widths", [(7,), (5, 4), (3, 3, 6)])
def test_it_ends_where_the_dense_quadratic_is_least(widths: tuple[int, ...]) -> None:
    blocks = drawn(9, *widths)
    steps = [newton_of(b) for b in blocks]
    damping = LAMBDA * sum(float(h.square().sum()) for h in steps)
    found = step_length(
        Weights({str(i): w for i, w in enumerate(widths)}),
        lambda: [{str(i): b[k : k + 4] for i, b in enumerate(blocks)} for k in (0, 4, 8)],
        {str(i): h for i, h in enumerate(steps)}, damping,
    )  # fmt: skip
    whole, h = torch.cat(blocks, 1), torch.cat(steps)
    fisher = whole.T @ whole / len(whole) + LAMBDA * torch.eye(len(h)).double()

    def quadratic(length: float) -> float:
        step = -length * h
        return float(step @ whole.mean(0) + step @ fisher @ step / 2)

    assert quadratic(found) < min(quadratic(found * 0.999), quadratic(found * 1.001))
    if len(widths) == 1:
        assert found == pytest.approx(1.0, abs=1e-12)  # the block is the whole
    else:
        assert found < 1


def test_twins_share_the_way() -> None:
    (block,) = drawn(12, 5)
    h = newton_of(block)
    damping = 3 * LAMBDA * float(h.square().sum())
    found = step_length(
        Weights(dict.fromkeys("abc", 5)), lambda: [dict.fromkeys("abc", block)],
        dict.fromkeys("abc", h), damping,
    )  # fmt: skip
    # 3 c/(9 c² + …) with λ as small as this: a third, but for what λ holds back
    assert found == pytest.approx(1 / 3, rel=2e-3)


@pytest.mark.parametrize("block", [4, None])
def test_the_driver_takes_that_step(monkeypatch: Any, block: int | None) -> None:
    data = pairs(30, 6, 3)
    model, batches, seen, after = mlp(6, 5, 3), singles(data), [], []
    start = copy.deepcopy(model)

    def spy(own: nn.Module, *given: Any) -> float:
        seen.append(step_length(own, *given))
        after.append([p.clone() for p in own.parameters()])
        return seen[-1]

    before = list(start.parameters())
    whole = torch.cat([rows(model, data, layer) for layer in prunable(model)], 1)
    monkeypatch.setattr(driver, "step_length", spy)
    damping = Damping(LAMBDA, relative=False)
    sparsify(model, loss, lambda: batches, Spec(0.5, "woodtaylor", block=block, damping=damping))
    sizes = [30, 15]
    steps = [
        newton_of(cut)
        for part in whole.split(sizes, 1)
        for cut in part.split(block or part.shape[1], 1)
    ]
    h = torch.cat(steps)
    slope = float(whole.mean(0) @ h)
    empirical = slope / float((whole @ h).square().mean() + LAMBDA * h.square().sum())
    own = slope / (curvature(start, data, h, empirical) + LAMBDA * float(h.square().sum()))
    # float64 both; the route's rounding times the condition of F + λ
    assert seen == [pytest.approx(min(empirical, own, 1.0), rel=1e-7)]
    torch.testing.assert_close(before, after[0], rtol=0, atol=0)


def curvature(model: nn.Module, data: Any, h: Tensor, length: float) -> float:
    """Return the loss's mean curvature over an eighth of a step along −h."""
    moved = copy.deepcopy(model)
    layers = [moved.get_parameter(layer.name) for layer in prunable(moved)]

    def slope() -> float:
        moved.zero_grad()
        loss(moved, data).backward()
        return float(torch.cat([p.grad.flatten() for p in layers if p.grad is not None]) @ h)

    first = slope()
    with torch.no_grad():
        for p, part in zip(layers, h.split([p.numel() for p in layers]), strict=True):
            p -= length / 8 * part.view(p.shape)
    return (first - slope()) / (length / 8)


@pytest.mark.parametrize("block", [8, None])
def test_a_model_at_its_minimum_stays_there(block: int | None) -> None:
    """There the empirical Fisher has vanished with the gradients, the loss's curvature hasn't."""
    data = pairs(60, 6, 3)
    model = mlp(6, 16, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(400):
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()
    before = loss(model, data).item()
    spec = Spec(0.0, "woodtaylor", block=block, damping=Damping(1e-3))
    found = sparsify(model, loss, lambda: singles(data), spec)
    after = loss(model, data).item()
    assert after < before
    (step,) = found.steps
    assert step.increase is not None and step.increase < 0
    # quadratic in a step that isn't small: the promise is of the right order
    assert (after - before) / step.increase == pytest.approx(1, abs=0.8)


def test_what_it_expects_without_zeros_is_the_line_searchs_gain() -> None:
    data = pairs(30, 6, 3)
    model, batches = mlp(6, 5, 3), singles(data)
    whole = torch.cat([rows(model, data, layer) for layer in prunable(model)], 1)
    h = torch.cat([newton_of(cut) for part in whole.split([30, 15], 1) for cut in part.split(5, 1)])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    damping = Damping(LAMBDA, relative=False)
    found = sparsify(model, loss, lambda: batches,
                     Spec(0.0, "woodtaylor", block=5, damping=damping))  # fmt: skip
    change = torch.cat([(model.get_parameter(la.name) - start[la.name]).flatten()
                        for la in prunable(model)]).detach()  # fmt: skip
    length = float(-(change @ h) / (h @ h))
    torch.testing.assert_close(change, -length * h, rtol=1e-7, atol=1e-10)
    (step,) = found.steps
    assert step.increase == pytest.approx(-length * float(whole.mean(0) @ h) / 2, rel=1e-7)
