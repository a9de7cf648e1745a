"""What finetuning minimises: how labels and teachers count, by the kind of a model's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

Ask = Callable[[], tuple[Tensor, Tensor]]
"""Gives a model's rows (n, m) and the teachers' (n, d) on some training samples."""


class Criterion(Protocol):
    """Losses over rows of answers (n, …), all means over rows."""

    def begun(self, ask: Ask) -> Criterion:
        """Return the criterion of one training, which may look at the model before it."""

    def combine(
        self, answers: Sequence[Tensor], weights: Sequence[float], temperature: float
    ) -> Tensor:
        """Return what several teachers say together, from their rows."""

    def taught(self, rows: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the distance from what the teachers say."""

    def labelled(self, rows: Tensor, labels: Tensor, smoothing: float) -> Tensor | None:
        """Return the loss against labels, None where there are none."""


@dataclass(frozen=True)
class Categorical:
    """One class of several: cross-entropy, and T²·KL(teachers ‖ model).

    The factor T² keeps the gradient's size independent of T. confident: whether of several teachers
    the one that is surest of a row, at temperature 1, says it alone; weights don't count then.
    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """

    confident: bool = False

    def begun(self, ask: Ask) -> Categorical:
        """Return itself."""
        return self

    def combine(
        self, answers: Sequence[Tensor], weights: Sequence[float], temperature: float
    ) -> Tensor:
        """Return the weighted mean of the probabilities (n, classes) at `temperature`."""
        if self.confident:
            return _surest(answers, temperature)
        return _mean((torch.softmax(z.float() / temperature, -1) for z in answers), weights)

    def taught(self, rows: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return T²·KL."""
        told = torch.log_softmax(rows / temperature, -1)
        return temperature**2 * nn.functional.kl_div(told, targets, reduction="batchmean")

    def labelled(self, rows: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Return cross-entropy."""
        return nn.functional.cross_entropy(rows, labels, label_smoothing=smoothing)


@dataclass(frozen=True)
class Several:
    """Any of several labels: binary cross-entropy of every label, T² times of softened teachers."""

    def begun(self, ask: Ask) -> Several:
        """Return itself."""
        return self

    def combine(
        self, answers: Sequence[Tensor], weights: Sequence[float], temperature: float
    ) -> Tensor:
        """Return the weighted mean of the labels' probabilities (n, classes)."""
        return _mean((torch.sigmoid(z.float() / temperature) for z in answers), weights)

    def taught(self, rows: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return T² times the cross-entropy against the teachers' probabilities."""
        told = rows / temperature
        return temperature**2 * nn.functional.binary_cross_entropy_with_logits(told, targets)

    def labelled(self, rows: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Return the cross-entropy; smoothing draws every label towards one half."""
        soft = labels * (1 - smoothing) + smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(rows, soft)


@dataclass(frozen=True)
class Numeric:
    """A number: squared error against labels and teachers alike."""

    def begun(self, ask: Ask) -> Numeric:
        """Return itself."""
        return self

    def combine(
        self, answers: Sequence[Tensor], weights: Sequence[float], temperature: float
    ) -> Tensor:
        """Return the weighted mean of the teachers' numbers (n, 1)."""
        return _mean((z.float() for z in answers), weights)

    def taught(self, rows: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the mean squared difference."""
        return nn.functional.mse_loss(rows, targets)

    def labelled(self, rows: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(rows[:, 0], labels.to(rows.dtype))


@dataclass(frozen=True)
class Direction:
    """A direction in a space of any width, so that similarities are the teachers'.

    Several teachers are one: their unit embeddings side by side, each times the root of its
    weight, have the weighted mean of their cosines. Two terms: 1 - cos to the teachers' embedding
    in the model's own width (`frame` (m, Σd)), and the mean squared difference of the cosines of
    all pairs of a batch, which no turn of the space changes (Park et al. 2019, arXiv 1904.05068,
    section 3). frame: the leading right singular vectors of the teachers' embeddings, which keep
    their inner products best (Eckart & Young 1936), turned onto the model's start by Procrustes
    (Schönemann 1966). Cosines are taken in float32, amid a training in bf16 too, which keeps two
    or three digits of them.
    """

    frame: Tensor | None = None
    pairs: float = 1.0

    def begun(self, ask: Ask) -> Direction:
        """Return the criterion with its frame, from what model and teachers say at the start."""
        rows, targets = (x.double() for x in ask())
        rows = nn.functional.normalize(rows, dim=1)
        width = min(rows.shape[1], targets.shape[1])
        basis = torch.linalg.svd(targets, full_matrices=False).Vh[:width]
        left, _, right = torch.linalg.svd(rows.T @ targets @ basis.T, full_matrices=False)
        return replace(self, frame=(left @ right @ basis).float())

    def combine(
        self, answers: Sequence[Tensor], weights: Sequence[float], temperature: float
    ) -> Tensor:
        """Return the teachers' joint unit embeddings (n, Σd)."""
        total = sum(weights)
        units = [nn.functional.normalize(z.float(), dim=1) for z in answers]
        return torch.cat([(w / total) ** 0.5 * z for w, z in zip(weights, units, strict=True)], 1)

    def taught(self, rows: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return both terms' sum."""
        with torch.autocast(rows.device.type, enabled=False):
            return self._apart(rows.float(), targets.float())

    def _apart(self, rows: Tensor, targets: Tensor) -> Tensor:
        own = nn.functional.normalize(rows, dim=1)
        gaps = (own @ own.T - targets @ targets.T).square()
        others = max(1, len(own) - 1)  # a pair of one with itself is no pair
        apart = self.pairs * gaps.sum() / (len(own) * others)
        if self.frame is None:
            return apart
        aim = nn.functional.normalize(targets @ self.frame.to(targets).T, dim=1)
        return (1 - (own * aim).sum(1)).mean() + apart

    def labelled(self, rows: Tensor, labels: Tensor, smoothing: float) -> None:
        """Return nothing: there are no labels."""
        return


def _mean(parts: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean, one part at a time: those over a vocabulary are large."""
    total = sum(weights)
    shares = iter([w / total for w in weights])
    every = iter(parts)
    found = next(every) * next(shares)
    for part, share in zip(every, shares, strict=True):
        found += share * part
    return found


def _surest(answers: Sequence[Tensor], temperature: float) -> Tensor:
    """Return for every row the probabilities of the teacher whose likeliest class is likeliest."""
    found, best = torch.empty(0), torch.empty(0)
    for scores in answers:
        told = torch.softmax(scores.float() / temperature, -1)
        sure = scores.float().amax(-1) - scores.float().logsumexp(-1)
        if not len(found):
            found, best = told, sure
        else:
            better = sure > best
            found = torch.where(better[:, None], told, found)
            best = torch.maximum(best, sure)
    return found
