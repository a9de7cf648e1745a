"""Pixels, augmentation and accuracy of image classification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tiny import random_vit
from torch import Tensor

from slimfuse.data import Image, Split
from slimfuse.errors import ParentError
from slimfuse.tasks import ImageClassification, accuracy, answers_of, ask
from slimfuse.tasks import image_classification as task
from slimfuse.tasks.image_classification import (
    PIXELS,
    Pixels,
    augment,
    load_processor,
    make_processor,
)

N, SIDE = 13, 6
MEAN, STD = (0.1, 0.3, 0.6), (0.5, 0.25, 0.2)


class Counted(Sequence[Image]):
    """Images that count how often they are decoded."""

    def __init__(self, images: np.ndarray) -> None:  # type: ignore[type-arg]
        self.images, self.reads = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Image:  # type: ignore[override]
        self.reads += 1
        return self.images[i]


def split() -> Split:
    images = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
    return Split(Counted(images), np.arange(N, dtype=np.int64) % 7)


def pixels(source: Split | None = None) -> Pixels:
    return Pixels(source or split(), make_processor(SIDE, MEAN, STD))


def test_pixels_are_scaled_and_normalised_channel_by_channel() -> None:
    source = split()
    found = pixels(source)[torch.tensor([3, 0])].arguments[PIXELS]
    raw = np.stack([source.items[3], source.items[0]]).astype(np.float64)
    want = (torch.from_numpy(raw / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert found.dtype == torch.float32
    # float32 arithmetic of numbers up to 5
    torch.testing.assert_close(found.double(), want.movedim(-1, 1).double(), rtol=0, atol=1e-5)


def test_cached_pixels_are_the_uncached_ones_and_are_decoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = torch.tensor([12, 0, 5, 5])
    cached = pixels()
    first, again = (cached[order].arguments[PIXELS] for _ in range(2))
    assert isinstance(cached.split.items, Counted)
    assert cached.split.items.reads == N  # once each
    monkeypatch.setattr(task, "CACHE_BYTES", 0)
    uncached = pixels()
    assert torch.equal(uncached[order].arguments[PIXELS], first) and torch.equal(again, first)
    assert isinstance(uncached.split.items, Counted)
    assert uncached.split.items.reads == len(order)


def test_the_cache_ends_where_its_bytes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    size = N * 3 * SIDE * SIDE * 4
    for limit, reads in ((size, N), (size - 1, 1)):
        monkeypatch.setattr(task, "CACHE_BYTES", limit)
        source = split()
        pixels(source)[torch.tensor([2])]
        assert isinstance(source.items, Counted) and source.items.reads == reads


def test_images_of_another_size_are_resized_to_the_models() -> None:
    big = np.full((1, 17, 9, 3), 128, dtype=np.uint8)
    found = Pixels(Split(list(big), np.zeros(1, dtype=np.int64)), make_processor(6, MEAN, STD))
    assert found[torch.tensor([0])].arguments[PIXELS].shape == (1, 3, 6, 6)


def batch(n: int = 64) -> Tensor:
    return torch.randn(n, 3, 29, 29, generator=torch.Generator().manual_seed(1))


def test_a_flip_mirrors_the_width_of_about_half_the_images() -> None:
    torch.manual_seed(0)
    x = batch()
    out = augment(x, ["flip"])
    kept = (out == x).flatten(1).all(1)
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert bool((kept ^ mirrored).all())  # each whole image is one or the other
    assert 16 < int(mirrored.sum()) < 48  # 32 expected, 4 standard deviations


def test_a_shift_moves_the_whole_image_and_repeats_its_edge() -> None:
    torch.manual_seed(0)
    x = batch()
    out = augment(x, ["shift"])
    reach, side = 2, 29  # a fourteenth of 29, rounded
    place = torch.arange(side)
    moves = []
    for image, found in zip(x, out, strict=True):
        hits = [
            (dy, dx)
            for dy in range(-reach, reach + 1)
            for dx in range(-reach, reach + 1)
            if torch.equal(
                found,
                image[:, (place + dy).clamp(0, side - 1)][:, :, (place + dx).clamp(0, side - 1)],
            )
        ]
        assert len(hits) == 1
        moves += hits
    assert {dy for dy, _ in moves} == {dx for _, dx in moves} == {-2, -1, 0, 1, 2}
    assert any(dy != dx for dy, dx in moves)


def test_augmentation_follows_the_global_seed_and_leaves_its_input_alone() -> None:
    x = batch()
    before = x.clone()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(augment(x, ["flip", "shift"]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(x, before)
    assert augment(x, []) is x


@pytest.mark.parametrize(("right", "n"), [(0, 17), (5, 17), (17, 17), (431, 599)])
def test_accuracy_comes_with_scipys_wilson_interval(right: int, n: int) -> None:
    labels = np.arange(n, dtype=np.int64) % 7
    predicted = np.where(np.arange(n) < right, labels, (labels + 1) % 7)
    found = accuracy(torch.nn.functional.one_hot(torch.from_numpy(predicted), 7).float(), labels)
    want = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert (found.value, found.n) == (right / n, n)
    assert (found.low, found.high) == (want.low, want.high)
    # Wilson's own formula, z of a two-sided 95 %
    z, p = 1.959963984540054, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_logits_come_in_order_whatever_the_batch_size() -> None:
    model: Any = random_vit().float()
    data = pixels()
    with torch.no_grad():
        want = model(**data[torch.arange(N)].arguments).logits
    answer = answers_of(model.train(), "logits")
    found = ask(answer, ImageClassification(), data, what="testing", batch_size=4)["logits"]
    # float32, batches of another size round differently
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_the_processor_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    make_processor(SIDE, MEAN, STD).save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    want, found = pixels()[torch.arange(3)], Pixels(split(), loaded)[torch.arange(3)]
    assert torch.equal(found.arguments[PIXELS], want.arguments[PIXELS])


def test_a_folder_without_a_processor_says_how_to_save_one(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match=r"save_pretrained"):
        load_processor(tmp_path)
