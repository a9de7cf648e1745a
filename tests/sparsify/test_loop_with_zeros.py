"""Training with zeros held: through momentum, weight decay, averages and interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimfuse.finetune import loop
from slimfuse.finetune.loop import fit
from slimfuse.finetune.schedule import Schedule
from slimfuse.saliency.masks import Masks

SAMPLES, STEPS = 23, 9


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def masks() -> Masks:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (5, 7), "2.weight": (3, 5)}
    return Masks({n: torch.rand(s, generator=generator) < 0.4 for n, s in shapes.items()})


def data() -> Tensor:
    return 3 * torch.randn(SAMPLES, 7, generator=torch.Generator().manual_seed(2))


def loss(model: nn.Module, indices: Tensor) -> Tensor:
    x = data()[indices]
    return 20 * (model(x) - x[:, :3]).square().mean()  # its gradient is clipped


def train(
    model: nn.Module, folder: Path, zeros: Masks | None, *, what: loop.Loss = loss,
    ema: float | None = None,
) -> list[float]:  # fmt: skip
    folder.mkdir(exist_ok=True)
    schedule = Schedule(STEPS, batch_size=5, lr=5e-2, weight_decay=0.5, ema=ema, seed=3)
    return fit(
        model, what, SAMPLES, schedule, precision="fp32", checkpoint=folder / "c.safetensors",
        what="testing", constraint=zeros,
    ).losses  # fmt: skip


@pytest.mark.parametrize("ema", [None, 0.9])
def test_no_step_brings_a_weight_back(tmp_path: Path, ema: float | None) -> None:
    model, zeros, start = net(), masks(), net()

    def watched(wrapped: nn.Module, indices: Tensor) -> Tensor:
        zeros.check(model)
        return loss(wrapped, indices)

    train(model, tmp_path, zeros, what=watched, ema=ema)
    zeros.check(model)
    saved = load_file(tmp_path / "c.safetensors")
    parameters = [name for name, _ in model.named_parameters()]
    for name, kept in zeros.items():
        moved = model.get_parameter(name) != start.get_parameter(name)
        assert bool(moved[kept].all())  # the others learn
        # two groups: matrices come first in the optimizer
        place = [n for n in parameters if n.endswith("weight")].index(name)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not saved[f"optimizer.{place}.{moment}"][~kept].any()
            assert saved[f"optimizer.{place}.{moment}"][kept].any()
        if ema is not None:
            assert not saved[f"average.module.{name}"][~kept].any()


def test_without_zeros_held_they_would_be_lost(tmp_path: Path) -> None:
    model = net()
    masks().apply(model)
    train(model, tmp_path, None)
    assert all(bool((model.get_parameter(n)[~k] != 0).all()) for n, k in masks().items())


def test_inputs_without_weights_might_as_well_not_be_there(tmp_path: Path) -> None:
    """Zeros count in no norm, no moment and no decay: training is that of a narrower net."""
    places = torch.tensor([0, 1, 2, 4])
    kept = torch.zeros(5, 7, dtype=torch.bool)
    kept[:, places] = True
    masked, narrow = net(), net()
    narrow[0] = nn.Linear(4, 5)
    with torch.no_grad():
        narrow[0].weight.copy_(masked[0].weight[:, places])
        narrow[0].bias.copy_(masked[0].bias)

    def narrowed(model: nn.Module, indices: Tensor) -> Tensor:
        x = data()[indices]
        return 20 * (model(x[:, places]) - x[:, :3]).square().mean()

    wide = train(masked, tmp_path / "wide", Masks({"0.weight": kept}))
    slim = train(narrow, tmp_path / "slim", None, what=narrowed)
    # float32: zeros are summed, too, in another order
    assert wide == pytest.approx(slim, rel=1e-4)
    torch.testing.assert_close(masked[0].weight[:, places], narrow[0].weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_an_interrupted_training_ends_with_the_same_bytes(
    tmp_path: Path, ema: float | None
) -> None:
    calls = iter(range(4))

    def interrupted(model: nn.Module, indices: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return loss(model, indices)

    want, found = net(), net()
    losses = train(want, tmp_path / "whole", masks(), ema=ema)
    with pytest.raises(KeyboardInterrupt):
        train(net(), tmp_path / "cut", masks(), what=interrupted, ema=ema)
    assert train(found, tmp_path / "cut", masks(), ema=ema) == losses
    for name, value in want.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    masks().check(found)
