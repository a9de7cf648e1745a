"""How far WoodTaylor goes along −h: the minimum of the whole Fisher's quadratic model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saliency.small_nets import loss, mlp, pairs, rows, singles
from torch import Tensor

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


@pytest.mark.parametrize("widths", [(7,), (5, 4), (3, 3, 6)])
def test_it_ends_where_the_dense_quadratic_is_least(widths: tuple[int, ...]) -> None:
    blocks = drawn(9, *widths)
    steps = [newton_of(b) for b in blocks]
    damping = LAMBDA * sum(float(h.square().sum()) for h in steps)
    found = step_length(
        [{str(i): b[k : k + 4] for i, b in enumerate(blocks)} for k in (0, 4, 8)],
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
    found = step_length([dict.fromkeys("abc", block)], dict.fromkeys("abc", h), damping)
    # 3 c/(9 c² + …) with λ as small as this: a third, but for what λ holds back
    assert found == pytest.approx(1 / 3, rel=2e-3)


@pytest.mark.parametrize("block", [4, None])
def test_the_driver_takes_that_step(monkeypatch: Any, block: int | None) -> None:
    data = pairs(30, 6, 3)
    model, batches, seen = mlp(6, 5, 3), singles(data), []

    def spy(*given: Any) -> float:
        seen.append(step_length(*given))
        return seen[-1]

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
    curvature = float((whole @ h).square().mean() + LAMBDA * h.square().sum())
    # float64 both; the route's rounding times the condition of F + λ
    assert seen == [pytest.approx(float(whole.mean(0) @ h) / curvature, rel=1e-8)]
