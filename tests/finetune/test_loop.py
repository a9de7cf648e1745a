"""The training loop: exact resume, every sample once an epoch, losses that are what they say."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Counting, shake, vit_config
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.families import ViT
from slimfuse.finetune import loop
from slimfuse.finetune.distill import Lesson, distillation_loss, labels_loss
from slimfuse.finetune.loop import fit
from slimfuse.finetune.schedule import Schedule, batch_indices, parameter_groups, steps_of
from slimfuse.tasks import ImageClassification

SAMPLES, STEPS = 23, 9
TASK = ImageClassification()


def model() -> Any:
    # dropout, so that the random numbers of a step matter
    config = vit_config(
        hidden_size=6, num_attention_heads=2, intermediate_size=7, num_hidden_layers=1,
        hidden_dropout_prob=0.2,
    )  # fmt: skip
    return shake(ViT().build(config), seed=0)


def inputs() -> Tensor:
    return torch.randn(SAMPLES, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def labels() -> Tensor:
    return torch.arange(SAMPLES) % 7


def learn() -> loop.Loss:
    x = inputs()
    # noise from the global generator, as augmentation draws it
    return labels_loss(
        TASK, lambda i: (pixels(x[i] + 0.1 * torch.randn(len(i), 3, 6, 6)), labels()[i])
    )


def train(
    net: nn.Module,
    loss: loop.Loss,
    folder: Path,
    ema: float | None,
    precision: loop.Precision = "fp32",
) -> list[float]:
    folder.mkdir(exist_ok=True)
    return fit(
        net,
        loss,
        SAMPLES,
        Schedule(steps=STEPS, batch_size=5, lr=1e-2, ema=ema, seed=3),
        precision=precision,
        checkpoint=folder / "train.safetensors",
        what="testing",
    ).losses


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


def test_the_average_is_the_mean_that_its_decay_says(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    loss = learn()

    def watched(net: nn.Module, indices: Tensor) -> Tensor:
        seen.append({k: v.detach().clone().double() for k, v in net.state_dict().items()})
        return loss(net, indices)

    averaged, last = model(), model()
    train(averaged, watched, tmp_path, 0.9)
    train(last, learn(), tmp_path, None)
    after = [*seen[1:], {k: v.double() for k, v in last.state_dict().items()}]
    for name, value in averaged.state_dict().items():
        mean = after[0][name]
        for weights in after[1:]:
            mean = 0.9 * mean + 0.1 * weights[name]
        # float32 sums of nine terms
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("samples", "size"), [(23, 5), (20, 5), (7, 11), (1, 1)])
def test_the_batches_of_an_epoch_hold_each_sample_once(samples: int, size: int) -> None:
    per_epoch = steps_of(samples, 1, size)
    epochs = []
    for epoch in range(3):
        batches = [batch_indices(samples, epoch * per_epoch + s, size, 1) for s in range(per_epoch)]
        assert all(1 <= len(b) <= size for b in batches)
        order = torch.cat(batches)
        assert sorted(order.tolist()) == list(range(samples))
        epochs.append(order.tolist())
    if samples > 7:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != list(range(samples))


@pytest.mark.parametrize(("samples", "size"), [(1203, 4), (37, 5), (3, 5)])
def test_batches_by_length_hold_each_sample_once_and_pad_little(samples: int, size: int) -> None:
    lengths = torch.randint(1, 50, (samples,), generator=torch.Generator().manual_seed(0))
    per_epoch = steps_of(samples, 1, size)

    def epoch(lengths: Tensor | None) -> list[Tensor]:
        return [batch_indices(samples, s, size, 1, lengths) for s in range(per_epoch)]

    grouped = epoch(lengths)
    assert sorted(torch.cat(grouped).tolist()) == list(range(samples))
    padded, before = (
        sum(len(b) * int(lengths[b].max()) for b in e) for e in (grouped, epoch(None))
    )
    # a pool of 50 batches has every length several times over
    assert padded <= before and (samples < 200 or padded < 1.1 * int(lengths.sum()))
    if samples > 200:  # the batches don't come in order of length
        means = torch.tensor([lengths[b].double().mean() for b in grouped])
        assert abs(float(torch.corrcoef(torch.stack([means, torch.arange(per_epoch)]))[0, 1])) < 0.2


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


def test_the_order_depends_on_the_seed() -> None:
    assert not torch.equal(batch_indices(23, 0, 23, 1), batch_indices(23, 0, 23, 2))
    assert torch.equal(batch_indices(23, 4, 5, 1), batch_indices(23, 4, 5, 1))


def test_the_rate_warms_up_linearly_and_ends_along_half_a_cosine() -> None:
    schedule = Schedule(steps=20, warmup=0.2)
    rates = [schedule.factor(s) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * k / 16)) for k in range(16)], rel=1e-12
    )
    assert rates[12] == pytest.approx(0.5)


def test_only_matrices_decay() -> None:
    net = model()
    names = {id(p): n for n, p in net.named_parameters()}
    decayed, kept = parameter_groups(net, 0.05)
    assert {names[id(p)] for p in decayed["params"]} == {  # type: ignore[attr-defined]
        n for n in names.values()
        if n.endswith("weight") and "layernorm" not in n and "embeddings.p" not in n
    } | {"vit.embeddings.patch_embeddings.projection.weight"}  # fmt: skip
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)  # type: ignore[arg-type]


def test_a_head_that_is_a_table_does_not_decay_and_gpt2s_matrices_do() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=6))
    names = {id(p): n for n, p in net.named_parameters()}
    decayed = {names[id(p)] for p in parameter_groups(net, 0.05)[0]["params"]}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert decayed == {f"transformer.h.0.{part}.weight" for part in parts}


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.01, 1), (0.5, 1), (1.5, 6)])
def test_any_training_has_a_step(epochs: float, steps: int) -> None:
    assert steps_of(10, epochs, 3) == steps if epochs != 0.5 else steps_of(2, epochs, 3) == steps


class Fixed(nn.Module):
    """A model that gives the logits it holds."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, pixel_values: Tensor) -> Any:
        return type("Out", (), {"logits": self.scores[pixel_values]})


def pixels(values: Tensor) -> Batch:
    return Batch({"pixel_values": values})


def classed(values: Tensor) -> tuple[Batch, Tensor]:
    return pixels(values), values % 7


def distil(student: Tensor, teacher: Tensor, t: float, hardness: float) -> tuple[Tensor, Tensor]:
    net = Fixed(student)

    def teach(indices: Tensor, _inputs: Batch, _labels: Tensor) -> Lesson:
        return Lesson(TASK.criterion.combine([teacher[indices]], [1.0], t))

    loss = distillation_loss(TASK, classed, teach, temperature=t, hardness=hardness)
    value = loss(net, torch.tensor([0, 3, 10, 7]))
    value.backward()
    assert net.scores.grad is not None
    return value.detach(), net.scores.grad


def scores(seed: int) -> Tensor:
    return 3 * torch.randn(11, 7, generator=torch.Generator().manual_seed(seed))


SINGLE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of seven classes


def test_distillation_without_teachers_is_cross_entropy() -> None:
    value, _ = distil(scores(0), scores(1), 4.0, 0.0)
    chosen = torch.tensor([0, 3, 10, 7])
    want = nn.functional.cross_entropy(scores(0)[chosen], chosen % 7)
    torch.testing.assert_close(value, want, **SINGLE)
    other, _ = distil(scores(0), scores(2), 2.0, 0.0)
    assert torch.equal(value, other)  # whatever the teachers say


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_at_the_teachers_own_logits_is_zero_with_zero_gradient(
    temperature: float,
) -> None:
    value, gradient = distil(scores(0), scores(0) + 5, temperature, 1.0)  # a shift means nothing
    torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, torch.zeros(11, 7), rtol=0, atol=1e-6)
    _, apart = distil(scores(0), scores(1), temperature, 1.0)
    assert float(apart.abs().max()) > 0.01


def test_distillation_is_hintons_formula_and_mixes_linearly() -> None:
    student, teacher, t = scores(0), scores(1), 3.0
    chosen = torch.tensor([0, 3, 10, 7])
    p, q = ((s[chosen].double() / t).softmax(-1) for s in (teacher, student))
    soft = float((p * (p / q).log()).sum(-1).mean()) * t * t
    hard = float(-student[chosen].double().log_softmax(-1)[range(4), chosen % 7].mean())
    for hardness in (0.0, 0.3, 1.0):
        value, _ = distil(student, teacher, t, hardness)
        want = hardness * soft + (1 - hardness) * hard
        assert float(value) == pytest.approx(want, rel=1e-5)  # float32


def test_soft_targets_are_the_weighted_mean_of_probabilities() -> None:
    found = TASK.criterion.combine([scores(0), scores(1)], [3.0, 1.0], 2.0)
    want = 0.75 * (scores(0) / 2).softmax(-1) + 0.25 * (scores(1) / 2).softmax(-1)
    torch.testing.assert_close(found, want, **SINGLE)
    torch.testing.assert_close(found.sum(-1), torch.ones(11), **SINGLE)


def test_label_smoothing_reaches_the_loss() -> None:
    x = torch.arange(11)
    plain, smooth = (labels_loss(TASK, classed, s)(Fixed(scores(0)), x) for s in (0.0, 0.3))
    log = scores(0).log_softmax(-1)
    want = 0.7 * plain.detach() - 0.3 * log.mean()
    torch.testing.assert_close(smooth.detach(), want, **SINGLE)


def test_a_damaged_checkpoint_starts_training_over(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"\x07\x00\x00")
    clean, resumed = (nn.Linear(3, 2), nn.Linear(3, 2))
    resumed.load_state_dict(clean.state_dict())
    x = torch.randn(11, 3)

    def loss(model: nn.Module, indices: torch.Tensor) -> torch.Tensor:
        return model(x[indices]).square().mean()

    plan = Schedule(steps=4, batch_size=5)
    for model, path in ((clean, tmp_path / "none"), (resumed, checkpoint)):
        fit(model, loss, 11, plan, precision="fp32", checkpoint=path, what="x")
    assert torch.equal(clean.weight, resumed.weight)


def test_the_precision_may_change_within_a_process(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp32"):
        train(model(), learn(), tmp_path / precision, None, precision)
