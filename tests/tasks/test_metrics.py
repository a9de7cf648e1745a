"""Figures and intervals against truths that are known without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, f1_score

from slimfuse.tasks import Measured, Metric
from slimfuse.tasks.metrics import (
    absolute_error,
    average_precision,
    bootstrap,
    macro_f1,
    micro_f1,
    perplexity,
    rank_correlation,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_bootstrap_interval_is_that_of_the_mean() -> None:
    values = noise(400)
    found = bootstrap(lambda i: values[i].mean(), 400)
    half = 1.96 * float(values.std()) / 20
    assert found.value == pytest.approx(float(values.mean())) and found.n == 400
    # 200 draws place a 2.5 % tail within some 15 % of the half width
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.2)


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_a_rank_correlation_is_scipys_and_its_interval_covers(strength: float) -> None:
    one = noise(300)
    two = strength * one + noise(300, seed=1)
    found = rank_correlation(one, two)
    assert found.value == pytest.approx(float(spearmanr(one, two).statistic))
    assert found.low < found.value < found.high
    same = rank_correlation(one, 2 * one + 1)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_intervals_of_rank_correlations_hold_the_truth_nineteen_times_in_twenty() -> None:
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # of two normal variables with correlation 0.6
    held = 0
    for seed in range(200):
        one, other = noise(2, 120, seed=seed)
        found = rank_correlation(one, 0.6 * one + 0.8 * other)
        held += found.low <= truth <= found.high
    assert 180 <= held <= 200  # 190 expected, ±3 standard deviations of a binomial


def test_f1_and_precision_are_sklearns() -> None:
    scores, labels = noise(90, 4), torch.arange(90) % 4
    want = f1_score(labels, scores.argmax(1), average="macro")
    assert macro_f1(scores, labels).value == pytest.approx(want)
    several = (noise(90, 4, seed=1) > 0.5).float()
    want = f1_score(several, scores > 0, average="micro")
    assert micro_f1(scores, several).value == pytest.approx(want)
    want = average_precision_score(several, scores.sigmoid(), average="macro")
    assert average_precision(scores, several).value == pytest.approx(want, rel=1e-5)
    assert absolute_error(scores[:, 0], scores[:, 0] + 2).value == pytest.approx(2)


@pytest.mark.filterwarnings("error")
def test_labels_that_no_sample_has_have_no_precision() -> None:
    """Those of a resample neither: the fourth label has one sample."""
    scores, labels = noise(60, 5), (noise(60, 5, seed=1) > 0.5).float()
    labels[:, 2] = 0
    labels[:, 3] = torch.arange(60) == 7
    found = average_precision(scores, labels)
    kept = [0, 1, 3, 4]
    want = average_precision_score(labels[:, kept], scores[:, kept].sigmoid(), average="macro")
    assert found.value == pytest.approx(want, rel=1e-5)
    assert found.low <= found.value <= found.high
    assert average_precision(scores, torch.zeros(60, 5)) == Measured(0.0, 0.0, 1.0, 60)


def test_perplexity_weighs_every_token_the_same() -> None:
    nll, tokens = torch.tensor([2.0, 12.0]), torch.tensor([1.0, 3.0])
    assert perplexity(nll, tokens).value == pytest.approx(float(np.exp(14 / 4)))
    uniform = perplexity(torch.full((5,), 7 * float(np.log(11))), torch.full((5,), 7.0))
    assert uniform.value == pytest.approx(11) and uniform.high - uniform.low < 1e-5


def test_a_loss_is_a_difference_or_a_share() -> None:
    high, low = Metric("accuracy"), Metric("perplexity", "lower", share=False)
    assert high.loss(0.8, 0.9) == pytest.approx(0.1)
    assert low.loss(22.0, 20.0) == pytest.approx(0.1)
    assert high.best({"a": 0.1, "b": 0.3}) == "b" and low.best({"a": 0.1, "b": 0.3}) == "a"
    measured = Measured(0.875, 0.865, 0.885, 10)
    assert high.text(measured) == "87.50% ± 1.00%"
    assert low.text(Measured(21.5, 20.5, 22.5, 10)) == "21.5 ± 1"
    assert high.limits(measured) == "87.50% (86.50% – 88.50%)"


def test_what_never_varies_has_no_rank() -> None:
    assert rank_correlation(torch.ones(9), noise(9)) == Measured(0.0, -1.0, 1.0, 9)
    assert rank_correlation(noise(1), noise(1)) == Measured(0.0, -1.0, 1.0, 1)
