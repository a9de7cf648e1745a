"""Distillation: losses that are what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from finetune.training import TASK, pixels
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.finetune.distill import Lesson, distillation_loss, labels_loss


class Fixed(nn.Module):
    """A model that gives the logits it holds."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, pixel_values: Tensor) -> Any:
        return type("Out", (), {"logits": self.scores[pixel_values]})


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
