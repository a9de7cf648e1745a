"""Held-out choice, parts of a step, rates by layer: each against what it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import shake, vit_config
from torch import Tensor, nn

from slimfuse.families import ViT
from slimfuse.finetune import loop
from slimfuse.finetune.checkpoint import Progress
from slimfuse.finetune.loop import fit
from slimfuse.finetune.schedule import Schedule, parameter_groups
from slimfuse.finetune.validate import Validation

SAMPLES, STEPS = 24, 10


class Line(nn.Module):
    """A linear model of 24 samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(4, 1)
        self.register_buffer("given", torch.randn(SAMPLES, 4))
        self.register_buffer("goals", torch.randn(SAMPLES))

    def forward(self, indices: Tensor) -> Tensor:
        given, goals = self.get_buffer("given"), self.get_buffer("goals")
        return (self.line(given[indices])[:, 0] - goals[indices]).square().mean()


def run(folder: Path, net: nn.Module, plan: Schedule, loss: Any = None, **more: Any) -> Progress:
    folder.mkdir(exist_ok=True)
    return fit(
        net, loss or (lambda wrapped, i: wrapped(i)), SAMPLES, plan, precision="fp32",
        checkpoint=folder / "checkpoint.safetensors", what="testing", **more,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_step_in_parts_is_the_step(tmp_path: Path, parts: int) -> None:
    plan = {"steps": STEPS, "batch_size": 8, "lr": 1e-2, "seed": 1}
    whole, split = Line(), Line()
    one = run(tmp_path / "whole", whole, Schedule(**plan))
    seen: list[int] = []

    def counted(wrapped: nn.Module, indices: Tensor) -> Tensor:
        seen.append(len(indices))
        value: Tensor = wrapped(indices)
        return value

    two = run(tmp_path / "split", split, Schedule(**plan, accumulate=parts), counted)
    assert len(seen) == parts * STEPS and sum(seen) == 8 * STEPS
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def values(*numbers: float) -> Callable[[nn.Module], float]:
    """Return a measurement that finds these numbers, one after the other."""
    left = iter(numbers)
    return lambda model: next(left)


def weights_after(folder: Path, steps: int) -> Tensor:
    """Return the weights behind so many steps of the plan below."""
    net, seen = Line(), list[Tensor]()

    def watched(wrapped: nn.Module, indices: Tensor) -> Tensor:
        seen.append(net.line.weight.detach().clone())
        value: Tensor = wrapped(indices)
        return value

    run(folder, net, PLAN, watched)
    return [*seen, net.line.weight.detach()][steps]


PLAN = Schedule(STEPS, batch_size=8, lr=1e-2)


@pytest.mark.parametrize(
    ("larger", "found", "best"),
    [(True, (1, 3, 2, 3, 0), 4), (False, (4, 2, 1, 5, 5), 6), (True, (1, 2, 3, 4, 5), 10),
     (True, (math.nan, 1, math.nan, 0.5, 0), 4)],
)  # fmt: skip
def test_the_best_weights_on_held_out_samples_are_kept(
    tmp_path: Path, larger: bool, found: tuple[float, ...], best: int
) -> None:
    net = Line()
    done = run(tmp_path / "x", net, PLAN, validation=Validation(values(*found), larger, 2))
    assert done.best_step == best and len(done.losses) == STEPS
    assert torch.equal(net.line.weight, weights_after(tmp_path / "y", best))


def test_training_ends_when_nothing_gets_better(tmp_path: Path) -> None:
    net = Line()
    judge = Validation(values(1, 3, 2, 3), True, 2, patience=2)
    done = run(tmp_path / "x", net, PLAN, validation=judge)
    assert done.stopped and len(done.losses) == 8 and done.best_step == 4
    assert torch.equal(net.line.weight, weights_after(tmp_path / "y", 4))


def test_the_average_is_what_is_measured_and_kept(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def measure(model: nn.Module) -> float:
        seen.append(model.get_parameter("line.weight").detach().clone())
        return float(len(seen) == 2)

    net = Line()
    plan = Schedule(STEPS, batch_size=8, lr=1e-1, ema=0.5)
    run(tmp_path, net, plan, validation=Validation(measure, True, 2))
    assert torch.equal(net.line.weight, seen[1]) and not torch.equal(seen[1], seen[2])


class Stopped(Exception):
    """What a test throws into the loop."""


@pytest.mark.parametrize("after", range(1, STEPS))
def test_a_killed_training_chooses_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    def measure(model: nn.Module) -> float:  # up and down, by the weights alone
        return math.sin(1e3 * float(model.get_parameter("line.weight").sum()))

    judge = Validation(measure, True, 2, patience=3)
    want = Line()
    whole = run(tmp_path / "whole", want, PLAN, validation=judge)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    left = iter(range(after))

    def stopping(wrapped: nn.Module, indices: Tensor) -> Tensor:
        if next(left, None) is None:
            raise Stopped
        value: Tensor = wrapped(indices)
        return value

    try:
        run(tmp_path / "cut", Line(), PLAN, stopping, validation=judge)
    except Stopped:
        pass
    else:
        assert whole.stopped and len(whole.losses) <= after
    again = Line()
    done = run(tmp_path / "cut", again, PLAN, validation=judge)
    assert (done.losses, done.best, done.best_step) == (whole.losses, whole.best, whole.best_step)
    assert torch.equal(again.line.weight, want.line.weight)


def test_best_weights_that_are_gone_are_found_anew(tmp_path: Path) -> None:
    judge = Validation(values(3, 1, 1, 1, 1), True, 2)
    run(tmp_path, Line(), PLAN, validation=judge)
    (tmp_path / "checkpoint-best.safetensors").write_bytes(b"damaged")
    net = Line()
    done = run(tmp_path, net, PLAN, validation=judge)
    assert done.best_step == 0 and len(done.losses) == STEPS
    assert torch.equal(net.line.weight, weights_after(tmp_path / "y", STEPS))


def test_rates_fall_by_layer_from_the_head_to_the_embeddings() -> None:
    net = shake(ViT().build(vit_config(num_hidden_layers=3)), seed=0)
    layout = ViT().layout(net.config)
    paths = [block.path for block in layout.blocks]
    groups = parameter_groups(net, 0.1, 0.5, paths)
    names = {id(p): n for n, p in net.named_parameters()}
    scale = {names[id(p)]: g["scale"] for g in groups for p in g["params"]}
    assert len(scale) == len(names)
    for name, value in scale.items():
        place = next((i for i, path in enumerate(paths) if name.startswith(f"{path}.")), None)
        want = 0.5 ** (3 - place) if place is not None else 0.5**4 if "embeddings" in name else 1.0
        assert value == want, name
    assert {g["scale"] for g in parameter_groups(net, 0.1)} == {1.0}
    assert len(parameter_groups(net, 0.1)) == 2


def test_a_table_that_all_layers_share_has_the_lowest_rate() -> None:
    net = nn.ModuleDict(
        {"low": nn.Linear(4, 4), "bias": nn.Embedding(3, 2), "head": nn.Linear(4, 1)}
    )
    groups = parameter_groups(net, 0.0, 0.5, ("low",))
    names = {id(p): n for n, p in net.named_parameters()}
    scale = {names[id(p)]: g["scale"] for g in groups for p in g["params"]}
    assert scale["bias.weight"] == 0.25
    assert scale["low.weight"] == 0.5 and scale["head.weight"] == 1.0


def test_layers_move_at_their_own_rates(tmp_path: Path) -> None:
    class Two(Line):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, indices: Tensor) -> Tensor:
            given = self.get_buffer("given")
            found: Tensor = self.second(self.first(given[indices]))
            return (found[:, 0] - self.get_buffer("goals")[indices]).square().mean()

    net = Two()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    plan = Schedule(1, batch_size=8, lr=1e-2, weight_decay=0.0, layer_decay=0.25)
    run(tmp_path, net, plan, blocks=("first", "second"))
    # Adam's first step is the rate, whatever the gradient
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in net.named_parameters()}
    assert moved["second.weight"] == pytest.approx(1e-2 * 0.25, rel=1e-3)
    assert moved["first.weight"] == pytest.approx(1e-2 * 0.25**2, rel=1e-3)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "polynomial"])
def test_every_schedule_warms_up_peaks_and_never_rises_again(shape: Any) -> None:
    plan = Schedule(steps=40, warmup=0.25, shape=shape)
    rates = [plan.factor(step) for step in range(40)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(b <= a for a, b in pairwise(rates[9:])) and rates[-1] > 0
    assert (rates[-1] == 1) == (shape == "constant")
    if shape == "linear":
        assert rates[25] == pytest.approx(0.5)


def test_a_norm_above_the_limit_is_clipped(tmp_path: Path) -> None:
    norms: list[float] = []
    for clip in (1e-3, 1e9):
        net, before = Line(), Line()
        run(tmp_path / str(clip), net, Schedule(1, batch_size=8, clip=clip, weight_decay=0.0),
            log=lambda _step, figures: norms.append(figures["norm"]))  # fmt: skip
        assert not torch.equal(net.line.weight, before.line.weight)
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1e-3  # told as it was


def test_figures_of_every_step_are_told(tmp_path: Path) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    judge = Validation(values(1, 2, 3, 4, 5), True, 2)
    done = run(tmp_path, Line(), PLAN, validation=judge, log=lambda s, f: told.append((s, dict(f))))
    assert [step for step, _ in told] == list(range(1, STEPS + 1))
    assert [f["loss"] for _, f in told] == done.losses
    assert [f["validation"] for s, f in told if s % 2 == 0] == [1, 2, 3, 4, 5]
    assert all("validation" not in f for s, f in told if s % 2)
    assert [f["rate"] for _, f in told] == [1e-2 * PLAN.factor(s) for s in range(STEPS)]
