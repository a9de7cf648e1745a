"""Steps without a finite loss: left out, then slower, then given up, all of it resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import Counting
from torch import Tensor, nn

from slimfuse.errors import SlimfuseError
from slimfuse.finetune import loop
from slimfuse.finetune.checkpoint import Progress
from slimfuse.finetune.loop import Loss, fit
from slimfuse.finetune.schedule import Schedule, batch_indices

SAMPLES, STEPS = 23, 12
PLAN = Schedule(STEPS, batch_size=5, lr=1e-2, weight_decay=0.0, seed=3, shape="constant", warmup=0)


def broken(at: Collection[int], how: Callable[[Tensor], Tensor]) -> Loss:
    """Return a loss that isn't finite at some steps, which it knows by their samples."""
    places = [batch_indices(SAMPLES, step, 5, 3) for step in at]

    def loss(net: nn.Module, indices: Tensor) -> Tensor:
        value: Tensor = net(indices)
        return how(value) if any(torch.equal(indices, p) for p in places) else value

    return loss


def run(folder: Path, loss: Loss, net: nn.Module | None = None, what: Schedule = PLAN) -> Progress:
    folder.mkdir(exist_ok=True)
    return fit(
        net or Counting(), loss, SAMPLES, what, precision="fp32",
        checkpoint=folder / "checkpoint.safetensors", what="testing",
    )  # fmt: skip


WAYS = {
    "infinite": lambda x: x * math.inf,
    "nan": lambda x: x * math.nan,
    # finite, but its gradient is not: the root of nought
    "gradient": lambda x: x.detach() + ((x - x.detach()) * 0).sqrt(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_one_bad_step_changes_nothing_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], way: Callable[[Tensor], Tensor]
) -> None:
    seen: list[dict[str, Tensor]] = []
    bad = broken([3], way)

    def watched(net: nn.Module, indices: Tensor) -> Tensor:
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return bad(net, indices)

    found = run(tmp_path, watched)
    assert [math.isnan(x) for x in found.losses] == [i == 3 for i in range(STEPS)]
    for name, value in seen[3].items():
        assert torch.equal(value, seen[4][name]), name  # the norm's statistics, too
        moved = value.is_floating_point() and name != "given"
        assert not moved or not torch.equal(value, seen[5][name]), name
    assert (found.bad, found.halvings) == (0, 0)
    assert "step 4 has no finite loss: skipped\n" in capsys.readouterr().err


def test_the_second_in_a_row_halves_the_rate_for_good(tmp_path: Path) -> None:
    rates: list[float] = []
    found = fit(
        Counting(), broken([2, 3, 4, 8], WAYS["nan"]), SAMPLES, PLAN, precision="fp32",
        checkpoint=tmp_path / "checkpoint.safetensors", what="testing",
        log=lambda _step, figures: rates.append(figures["rate"]),
    )  # fmt: skip
    assert found.halvings == 2
    assert rates == pytest.approx([1e-2] * 4 + [5e-3] + [2.5e-3] * 7)


@pytest.mark.parametrize("after", [3, 4, 5, 9])
def test_a_resumed_training_remembers_bad_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    bad = broken([2, 3, 4, 8], WAYS["nan"])
    want = Counting()
    losses = run(tmp_path / "whole", bad, want).losses
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    left = iter(range(after))

    class Stopped(Exception):
        pass

    def stopping(net: nn.Module, indices: Tensor) -> Tensor:
        if next(left, None) is None:
            raise Stopped
        return bad(net, indices)

    with pytest.raises(Stopped):
        run(tmp_path / "cut", stopping)
    resumed = Counting()
    again = run(tmp_path / "cut", bad, resumed)
    torch.testing.assert_close(again.losses, losses, rtol=0, atol=0, equal_nan=True)
    assert again.halvings == 2
    for name, value in want.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_six_in_a_row_end_it_with_the_weights_from_before(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    bad = broken(range(3, STEPS), WAYS["infinite"])

    def watched(net: nn.Module, indices: Tensor) -> Tensor:
        seen.append(net.get_parameter("line.weight").detach().clone())
        return bad(net, indices)

    with pytest.raises(SlimfuseError, match="6 steps in a row, up to step 9, while") as caught:
        run(tmp_path, watched)
    assert "learning rate" in str(caught.value.hint)
    file = tmp_path / "checkpoint.safetensors"
    assert str(file) in str(caught.value.hint)
    assert torch.equal(load_file(file)["model.line.weight"], seen[3])
