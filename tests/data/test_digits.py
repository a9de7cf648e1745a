"""The digits: sizes, a stratified split, a stable fingerprint."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits as sklearn_digits

from slimfuse.data import load_digits

# of scikit-learn's shipped file: changes only if the data, our scaling or our splits do
FINGERPRINT = "7de2291dee6da578f78faff53d2f32d15a780664d221a6f681456559bb2cab5f"


def test_sizes_and_types() -> None:
    data = load_digits()
    assert (len(data.train), len(data.test)) == (1198, 599)
    assert data.classes == tuple("0123456789") and data.image_size == 8
    image = data.train.items[0]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert data.train.labels.dtype == np.int64


def test_the_splits_are_disjoint_complete_and_hold_every_class_alike() -> None:
    data = load_digits()
    ours = np.concatenate([np.stack(list(s.items))[..., 0] for s in (data.train, data.test)])
    theirs = np.rint(sklearn_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))
    assert ours.max() == 255 and ours.min() == 0
    train, test = (np.bincount(s.labels, minlength=10) for s in (data.train, data.test))
    assert np.abs(train / 2 - test).max() <= 1.5  # a third of 174 … 183 a class


def test_the_statistics_are_those_of_the_training_images() -> None:
    data = load_digits()
    pixels = np.stack(list(data.train.items)) / 255
    # float64 sums of 230 016 numbers below 1
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 1, 2)), rtol=1e-10)


def test_the_fingerprint_is_stable() -> None:
    assert load_digits().fingerprint == FINGERPRINT
    a, b = load_digits(), load_digits()
    assert np.array_equal(a.train.labels, b.train.labels)
