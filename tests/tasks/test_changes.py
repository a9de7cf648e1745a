"""Random changes to pictures: by torch's generator alone, shares of labels that add up."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimfuse.batch import Batch
from slimfuse.data import load_digits
from slimfuse.tasks import ImageClassification
from slimfuse.tasks.changes import erase, mixing
from slimfuse.tasks.criteria import Categorical
from slimfuse.tasks.image_classification import PIXELS, make_processor

CLASSES = 10


def pixels(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def mixed(alpha: tuple[float, float], n: int = 8) -> tuple[Tensor, Tensor]:
    inputs, shares = mixing(*alpha, CLASSES)(Batch({PIXELS: pixels(n)}), torch.arange(n) % CLASSES)
    return inputs.arguments[PIXELS], shares


def examples(kinds: Any) -> Tensor:
    data, task = load_digits(), ImageClassification()
    samples = task.samples(data.train, make_processor(16, data.mean, data.std))
    return task.examples(samples, torch.arange(6), kinds)[0].arguments[PIXELS]


WAYS: dict[str, Callable[[], Tensor]] = {
    "mixup": lambda: mixed((0.8, 0))[0],
    "cutmix": lambda: mixed((0, 1.0))[0],
    "both": lambda: mixed((0.8, 1.0))[0],
    "erase": lambda: erase(pixels(32)),
    "rand-augment": lambda: examples(("rand-augment",)),
    "all": lambda: examples(("rand-augment", "flip", "shift", "erase")),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_step_can_be_made_again_and_nobody_else_notices(way: Callable[[], Tensor]) -> None:
    before = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    torch.manual_seed(5)
    first = way()
    random.seed(77)
    np.random.seed(77)
    torch.manual_seed(5)
    assert torch.equal(way(), first)
    assert random.random() == random.Random(77).random()
    torch.manual_seed(6)
    assert not torch.equal(way(), first)
    random.setstate(before[0])
    assert np.random.get_state()[1] is not None  # type: ignore[index]


@pytest.mark.parametrize("alpha", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("n", [1, 7, 8])
def test_shares_are_of_the_classes_that_were_blended(alpha: tuple[float, float], n: int) -> None:
    torch.manual_seed(3)
    given = pixels(n)
    found, shares = mixed(alpha, n)
    assert found.shape == given.shape and shares.shape == (n, CLASSES)
    torch.testing.assert_close(shares.sum(1), torch.ones(n), rtol=0, atol=1e-6)
    even = n // 2 * 2
    for i in range(even):
        partner = even - 1 - i  # timm blends a batch with itself in reverse
        assert set(shares[i].nonzero()[:, 0].tolist()) <= {i % CLASSES, partner % CLASSES}
    if n % 2:  # the last of an odd batch stays
        assert torch.equal(found[-1], given[-1]) and shares[-1, (n - 1) % CLASSES] == 1
    assert even == 0 or not torch.equal(found[:even], given[:even])
    assert torch.equal(given, pixels(n))  # what was given stays


def test_mixed_pictures_are_the_sum_that_their_labels_say() -> None:
    torch.manual_seed(3)
    given = pixels(8)
    found, shares = mixed((0.8, 0.0))
    for i in range(8):
        share = float(shares[i, i])
        want = share * given[i] + (1 - share) * given[7 - i]
        torch.testing.assert_close(found[i], want, rtol=1e-4, atol=1e-5)
    rows = torch.randn(8, CLASSES)
    loss = Categorical().labelled(rows, shares, 0.0)
    want = -(shares * rows.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, want)


def test_a_quarter_loses_a_rectangle() -> None:
    torch.manual_seed(0)
    given = torch.zeros(400, 3, 8, 8)
    changed = (erase(given) != 0).flatten(1).any(1).double().mean()
    assert 0.15 < float(changed) < 0.35  # 0.25 ± 4.6 standard errors
    assert not given.any()
