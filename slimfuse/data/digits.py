"""The 1 797 grey 8 x 8 digits that scikit-learn ships (UCI optical digits)."""

from __future__ import annotations

import hashlib

import numpy as np

from slimfuse.data.base import ImageData, Split

TEST_FRACTION = 1 / 3


def load_digits() -> ImageData:
    """Return 1 198 training and 599 test images, split by class with a fixed seed."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    bunch = sklearn_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=0
    )
    content = b"".join(part.tobytes() for part in (images, labels, train, test))
    mean, std = (float(f(grey[train] / 255)) for f in (np.mean, np.std))
    return ImageData(
        name="digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        classes=tuple(str(d) for d in range(10)),
        image_size=8,
        mean=(mean,) * 3,
        std=(std,) * 3,
        fingerprint=hashlib.sha256(content).hexdigest(),
    )
