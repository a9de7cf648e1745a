"""The training loop: exact resume, interruptions, what a run of it changes."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from finetune.training import SAMPLES, STEPS, learn, model, train
from safetensors.torch import load_file
from tiny import Counting
from torch import Tensor, nn

from slimfuse.finetune import loop
from slimfuse.finetune.loop import fit
from slimfuse.finetune.schedule import Schedule


class Interrupted(Exception):
    """What a test throws into the loop."""


def stopping(loss: loop.Loss, after: int) -> loop.Loss:
    calls = iter(range(after))

    def stop(net: nn.Module, indices: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise Interrupted
        return loss(net, indices)

    return stop


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # the recipes' default where it is fast
@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("after", [1, 4, STEPS - 1])
@pytest.mark.usefixtures("two_threads")
def test_resumed_training_ends_bit_identical(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ema: float | None,
    after: int,
    precision: loop.Precision,
) -> None:
    undisturbed, disturbed = model(), model()
    want = train(undisturbed, learn(), tmp_path / "undisturbed", ema, precision)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        train(disturbed, stopping(learn(), after), tmp_path, ema, precision)
    assert (tmp_path / "train.safetensors").is_file()
    torch.manual_seed(12345)  # another process starts elsewhere
    resumed = model()
    steps: list[Tensor] = []

    def counted(net: nn.Module, indices: Tensor) -> Tensor:
        steps.append(indices)
        return learn()(net, indices)

    got = train(resumed, counted, tmp_path, ema, precision)
    assert len(steps) == STEPS - after  # it went on, it didn't start again
    assert got == want
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    again = model()  # killed after the last step: nothing is trained twice
    assert train(again, stopping(learn(), 0), tmp_path, ema, precision) == want
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("late", [False, True], ids=["before the forward", "behind it"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_an_interrupted_step_is_forgotten_and_all_before_it_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ema: float | None, late: bool
) -> None:
    calls = iter(range(4))

    def interrupted(net: nn.Module, indices: Tensor) -> Tensor:
        stop = next(calls, None) is None
        found: Tensor = torch.zeros(()) if stop and not late else net(indices)
        if stop:
            raise KeyboardInterrupt
        return found

    want = Counting()
    losses = train(want, lambda net, i: net(i), tmp_path / "undisturbed", ema)
    with pytest.raises(KeyboardInterrupt):
        train(Counting(), interrupted, tmp_path, ema)
    assert "testing: saved after 4 of 9 steps" in capsys.readouterr().err
    seen: list[Tensor] = []
    resumed = Counting()
    assert train(resumed, lambda net, i: (seen.append(i), net(i))[1], tmp_path, ema) == losses
    assert len(seen) == STEPS - 4
    files = [folder / "train.safetensors" for folder in (tmp_path / "undisturbed", tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for name, value in want.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a terminal has it: a shell's background jobs are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_the_step_and_a_second_one_does_not(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    done: list[int] = []

    def pressed(net: nn.Module, indices: Tensor) -> Tensor:
        done.append(len(done))
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return net(indices)  # type: ignore[no-any-return]

    with pytest.raises(KeyboardInterrupt):
        train(Counting(), pressed, tmp_path, None)
    assert len(done) == 3 and signal.getsignal(signal.SIGINT) is before
    assert len(load_file(tmp_path / "train.safetensors")["history"]) == 3  # its step, too

    def twice(net: nn.Module, indices: Tensor) -> Tensor:
        done.append(len(done))
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        train(Counting(), twice, tmp_path, None)
    assert len(done) == 4
    assert len(load_file(tmp_path / "train.safetensors")["history"]) == 3


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_last_step_is_not_swallowed(tmp_path: Path) -> None:
    calls = iter(range(STEPS - 1))

    def last(net: nn.Module, indices: Tensor) -> Tensor:
        if next(calls, None) is None:
            signal.raise_signal(signal.SIGINT)
        return net(indices)  # type: ignore[no-any-return]

    with pytest.raises(KeyboardInterrupt):
        train(Counting(), last, tmp_path, None)
    assert len(load_file(tmp_path / "train.safetensors")["history"]) == STEPS


def test_training_changes_every_parameter_and_ends_in_evaluation_mode(tmp_path: Path) -> None:
    net, start = model(), model().state_dict()
    history = train(net, learn(), tmp_path, None)
    assert len(history) == STEPS and all(math.isfinite(v) for v in history)
    assert not net.training
    for name, value in net.state_dict().items():
        if "k_proj.bias" not in name:  # a constant over keys leaves the softmax as it was
            assert not torch.equal(value, start[name]), name


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_active_where_asked_for(tmp_path: Path, dropout: bool) -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
    seen: list[tuple[bool, bool]] = []

    def loss(wrapped: nn.Module, indices: Tensor) -> Tensor:
        seen.append((net[0].training, net[1].training))
        return wrapped(torch.ones(len(indices), 4) * indices[:, None]).square().mean()

    plan = Schedule(steps=2, batch_size=5, dropout=dropout)
    fit(net, loss, SAMPLES, plan, precision="fp32", checkpoint=tmp_path / "c", what="testing")
    assert seen == [(dropout, True)] * 2


def test_a_damaged_checkpoint_starts_training_over(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"\x07\x00\x00")
    clean, resumed = (nn.Linear(3, 2), nn.Linear(3, 2))
    resumed.load_state_dict(clean.state_dict())
    x = torch.randn(11, 3)

    def loss(model: nn.Module, indices: torch.Tensor) -> torch.Tensor:
        return model(x[indices]).square().mean()

    plan = Schedule(steps=4, batch_size=5)
    for net, path in ((clean, tmp_path / "none"), (resumed, checkpoint)):
        fit(net, loss, 11, plan, precision="fp32", checkpoint=path, what="x")
    assert torch.equal(clean.weight, resumed.weight)


def test_the_precision_may_change_within_a_process(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp32"):
        train(model(), learn(), tmp_path / precision, None, precision)
