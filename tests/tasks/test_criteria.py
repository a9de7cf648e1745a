"""What finetuning minimises: every loss against its formula, and nought where nothing is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfuse.tasks.criteria import Categorical, Direction, Numeric, Several

CRITERIA = (Categorical(), Several(), Numeric(), Direction())
TIGHT = {"rtol": 1e-5, "atol": 1e-6}  # float32 means of a few dozen numbers


def rows(seed: int, width: int = 5, count: int = 7) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_several_labels_are_taught_by_the_cross_entropy_of_each() -> None:
    student, teacher, t = rows(0), rows(1), 2.0
    targets = Several().combine([teacher], [3.0], t)
    p, q = (teacher.double() / t).sigmoid(), (student.double() / t).sigmoid()
    want = -t * t * (p * q.log() + (1 - p) * (1 - q).log()).mean()
    torch.testing.assert_close(Several().taught(student, targets, t).double(), want, **TIGHT)
    labels = (rows(2) > 0).float()
    own = student.double().sigmoid()
    hard = -(labels * own.log() + (1 - labels) * (1 - own).log()).mean()
    torch.testing.assert_close(Several().labelled(student, labels, 0.0).double(), hard, **TIGHT)
    even = Several().labelled(torch.zeros(1, 1), torch.ones(1, 1), 0.5)
    assert float(even) == pytest.approx(0.6931472)  # log 2, whatever is smoothed


def test_numbers_are_taught_by_squared_errors() -> None:
    targets = Numeric().combine([rows(0, 1), rows(1, 1)], [1.0, 3.0], 9.0)
    torch.testing.assert_close(targets, 0.25 * rows(0, 1) + 0.75 * rows(1, 1), **TIGHT)
    value = Numeric().taught(rows(2, 1), targets, 9.0)
    torch.testing.assert_close(value, (rows(2, 1) - targets).square().mean(), **TIGHT)
    labels = torch.arange(7.0)
    value = Numeric().labelled(rows(2, 1), labels, 0.0)
    torch.testing.assert_close(value, (rows(2, 1)[:, 0] - labels).square().mean(), **TIGHT)


def test_joint_embeddings_have_the_weighted_mean_of_the_cosines() -> None:
    parts, weights = [rows(0, 5), rows(1, 3)], [1.0, 3.0]
    joint = Direction().combine(parts, weights, 1.0)
    units = [nn.functional.normalize(x, dim=1) for x in parts]
    want = 0.25 * units[0] @ units[0].T + 0.75 * units[1] @ units[1].T
    torch.testing.assert_close(joint @ joint.T, want, **TIGHT)


def test_an_embedding_that_is_turned_and_stretched_is_perfect() -> None:
    turn = torch.linalg.qr(rows(3, 5, 5).double()).Q.float()
    student = 7 * rows(0) @ turn
    targets = Direction().combine([rows(0)], [1.0], 1.0)
    judge = Direction().begun(lambda: (student, targets))
    assert judge.frame is not None and judge.frame.shape == (5, 5)
    torch.testing.assert_close(judge.taught(student, targets, 1.0), torch.tensor(0.0), **TIGHT)
    assert float(judge.taught(rows(1), targets, 1.0)) > 0.1


def test_a_narrow_frame_spans_the_teachers_leading_directions() -> None:
    targets = rows(0, 6, 40).double() * torch.tensor([5, 4, 3, 0.01, 0.01, 0.01])
    judge = Direction().begun(lambda: (rows(1, 3, 40), targets.float()))
    assert judge.frame is not None and judge.frame.shape == (3, 6)
    torch.testing.assert_close(judge.frame @ judge.frame.T, torch.eye(3), **TIGHT)
    # nearly all of their energy is in it, so cosines survive
    kept = (targets.float() @ judge.frame.T).square().sum() / targets.square().sum()
    assert float(kept) > 0.999


def test_pairs_alone_count_without_a_frame() -> None:
    student, targets = rows(0, 4), Direction().combine([rows(1, 6)], [1.0], 1.0)
    own = nn.functional.normalize(student, dim=1)
    gaps = (own @ own.T - targets @ targets.T).square()
    want = gaps.sum() / (7 * 6)
    torch.testing.assert_close(Direction().taught(student, targets, 1.0), want, **TIGHT)
    assert Direction().labelled(student, torch.zeros(7), 0.0) is None


def test_cosines_are_of_float32_amid_a_training_in_bf16() -> None:
    targets = Direction().combine([rows(1, 6, 40)], [1.0], 1.0)
    judge = Direction().begun(lambda: (rows(0, 4, 40), targets))
    student = rows(2, 4, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = judge.taught(student, targets, 1.0)
        rounded = judge.taught(student.bfloat16(), targets.bfloat16(), 1.0)
    assert torch.equal(found, judge.taught(student, targets, 1.0))
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize("criterion", [Categorical(), Several(), Numeric()])
def test_teachers_are_averaged_by_their_weights(criterion: Any) -> None:
    parts = [rows(0), rows(1), rows(2)]
    every = [criterion.combine([part], [5.0], 2.0) for part in parts]
    want = 0.25 * every[0] + 0.5 * every[1] + 0.25 * every[2]
    before = [part.clone() for part in parts]
    torch.testing.assert_close(criterion.combine(parts, [1.0, 2.0, 1.0], 2.0), want, **TIGHT)
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))  # only read


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_a_model_that_says_what_its_teacher_says_has_no_gradient(criterion: object) -> None:
    judge = criterion
    student = rows(0, 1 if isinstance(judge, Numeric) else 5).requires_grad_()
    targets = judge.combine([student.detach()], [2.0], 3.0)  # type: ignore[attr-defined]
    judge.taught(student, targets, 3.0).backward()  # type: ignore[attr-defined]
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6  # float32
