"""The order of samples, the rate, the decay and the average of a training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from finetune.training import learn, model, train
from torch import Tensor, nn

from slimfuse.finetune.schedule import Schedule, batch_indices, parameter_groups, steps_of


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
