"""Figures with their intervals: shares of right answers, scores by the bootstrap, correlations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 200
LEVEL = 0.95
NORMAL = 1.959963984540054  # the normal quantile of a 95 % interval


@dataclass(frozen=True)
class Measured:
    """A figure with its 95 % interval over `n` samples."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Metric:
    """What a figure is called, which direction is better, and whether it reads in per cent."""

    key: str
    better: Literal["higher", "lower"] = "higher"
    share: bool = True

    def loss(self, got: float, base: float) -> float:
        """Return how much worse `got` is than `base`.

        Of figures that should be high their difference, of others (perplexity, errors) the share
        by which `got` is larger.
        """
        return base - got if self.better == "higher" else got / base - 1

    def best(self, figures: dict[str, float]) -> str:
        """Return the name of the best of some values."""
        return (max if self.better == "higher" else min)(figures, key=lambda k: figures[k])

    def text(self, measured: Measured) -> str:
        """Return a figure with half its interval: 87.90% ± 0.60%."""
        half = (measured.high - measured.low) / 2
        if self.share:
            return f"{measured.value:.2%} ± {half:.2%}"
        return f"{measured.value:.4g} ± {half:.2g}"

    def limits(self, measured: Measured) -> str:
        """Return a figure with its interval: 87.90% (87.20% – 88.50%)."""
        form = ".2%" if self.share else ".4g"
        return f"{measured.value:{form}} ({measured.low:{form}} – {measured.high:{form}})"

    def amount(self, value: float) -> str:
        """Return a loss: 1.20% of figures that are shares or lower the better, else a number."""
        return f"{value:.2%}" if self.share or self.better == "lower" else f"{value:.3f}"


def accuracy(scores: NDArray[np.float32] | Tensor, labels: NDArray[np.int64] | Tensor) -> Measured:
    """Return top-1 accuracy of scores (n, classes) with its 95 % Wilson interval."""
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score

    predicted = np.asarray(scores).argmax(axis=1)
    right = int(accuracy_score(np.asarray(labels), predicted, normalize=False))
    interval = binomtest(right, len(labels)).proportion_ci(method="wilson")
    return Measured(right / len(labels), float(interval.low), float(interval.high), len(labels))


def bootstrap(score: Callable[[Tensor], Tensor], n: int) -> Measured:
    """Return score(all places) with its 95 % percentile interval over resampled samples.

    score: of the samples at some places (r,), a number. 200 seeded draws with replacement.
    Source: Efron & Tibshirani 1993, ch. 13.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [score(torch.randint(n, (n,), generator=generator)) for _ in range(RESAMPLES)]
    ).double()
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = draws.nanquantile(tails).tolist()
    return Measured(float(score(torch.arange(n))), low, high, n)


def rank_correlation(one: Tensor, two: Tensor) -> Measured:
    """Return Spearman's correlation of two variables (n,) with its 95 % interval.

    Nought, and nothing known, where one never varies. Fisher's z with the variance
    (1 + r²/2) / (n - 3) (Bonett & Wright 2000, equation 5).
    """
    from scipy.stats import spearmanr

    n = len(one)
    if n < 2 or bool((one == one[0]).all()) or bool((two == two[0]).all()):
        return Measured(0.0, -1.0, 1.0, n)  # what never varies says nothing
    value = float(spearmanr(one.numpy(), two.numpy()).statistic)
    if n < 4 or not abs(value) < 1:
        return Measured(value, value, value, n)
    spread = NORMAL * math.sqrt((1 + value**2 / 2) / (n - 3))
    z = math.atanh(value)
    return Measured(value, math.tanh(z - spread), math.tanh(z + spread), n)


def macro_f1(scores: Tensor, labels: Tensor) -> Measured:
    """Return the mean of the classes' F1 for scores (n, classes), with its bootstrap interval."""
    from torchmetrics.functional.classification import multiclass_f1_score

    predicted, count = scores.argmax(1), scores.shape[1]

    def score(places: Tensor) -> Tensor:
        found: Tensor = multiclass_f1_score(
            predicted[places], labels[places], count, average="macro"
        )
        return found

    return bootstrap(score, len(labels))


def micro_f1(scores: Tensor, labels: Tensor) -> Measured:
    """Return F1 over all labels of all samples for logits (n, classes), decided at nought."""
    from torchmetrics.functional.classification import multilabel_f1_score

    predicted, wanted = (scores > 0).int(), labels.int()

    def score(places: Tensor) -> Tensor:
        found: Tensor = multilabel_f1_score(
            predicted[places], wanted[places], scores.shape[1], average="micro"
        )
        return found

    return bootstrap(score, len(labels))


def average_precision(scores: Tensor, labels: Tensor) -> Measured:
    """Return the mean over labels of the area under precision and recall, logits (n, classes).

    Over those labels that a sample has: of the others there is no recall. Nought, and nothing
    known, where no sample has any.
    """
    from torchmetrics.functional.classification import binary_average_precision

    probabilities, wanted = scores.sigmoid(), labels.int()
    if not bool(wanted.any()):
        return Measured(0.0, 0.0, 1.0, len(labels))

    def score(places: Tensor) -> Tensor:
        told, true = probabilities[places], wanted[places]
        areas = [
            binary_average_precision(told[:, k], true[:, k]) for k in true.any(0).nonzero()[:, 0]
        ]
        return torch.stack(areas).mean() if areas else torch.tensor(torch.nan)

    return bootstrap(score, len(labels))


def absolute_error(found: Tensor, wanted: Tensor) -> Measured:
    """Return the mean absolute error of numbers (n,), with its bootstrap interval."""
    from torchmetrics.functional.regression import mean_absolute_error

    return bootstrap(lambda i: mean_absolute_error(found[i], wanted[i]), len(found))


def perplexity(nll: Tensor, tokens: Tensor) -> Measured:
    """Return exp(mean negative log-likelihood a token) from sums (n,) a sample, bootstrapped."""
    return bootstrap(lambda i: (nll[i].sum() / tokens[i].sum()).exp(), len(nll))


def share(hits: Tensor, tokens: Tensor) -> Measured:
    """Return a share of tokens from counts (n,) a sample, bootstrapped over samples."""
    return bootstrap(lambda i: hits[i].sum() / tokens[i].sum(), len(hits))
