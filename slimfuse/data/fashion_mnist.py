"""Fashion-MNIST from the Debian package `dataset-fashion-mnist` (MIT licence)."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimfuse.data import cache, debian
from slimfuse.data.base import ImageData, Split

SHA256 = {
    "train-images-idx3-ubyte": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
TITLE = "Fashion-MNIST"
PACKAGE = "dataset-fashion-mnist"
SYSTEM = Path("/usr/share/datasets/fashion-mnist")


def cache_folder() -> Path:
    """Return the per-user folder the package is unpacked into when it isn't installed."""
    return cache.cache_folder("fashion-mnist")


def load_fashion_mnist(path: str | None = None) -> ImageData:
    """Return 60 000 training and 10 000 test images of 28 x 28 pixels.

    Looks in `path`, else in the installed package's folder, else unpacks the package (no root
    needed) into the user's cache. Raises DataError when a file is missing or altered.
    """
    folder = Path(path) if path else _find()
    digest = hashlib.sha256()
    arrays = {}
    for name, expected in SHA256.items():
        arrays[name] = _read(folder / f"{name}.gz", expected)
        digest.update(expected.encode())
    train, test = (
        Split(
            list(np.broadcast_to(images[..., None], (*images.shape, 3))),
            arrays[f"{part}-labels-idx1-ubyte"].astype(np.int64),
        )
        for part in ("train", "t10k")
        for images in (arrays[f"{part}-images-idx3-ubyte"],)
    )
    return ImageData(
        name="fashion-mnist",
        train=train,
        test=test,
        classes=CLASSES,
        image_size=28,
        mean=(0.2860,) * 3,
        std=(0.3530,) * 3,
        fingerprint=digest.hexdigest(),
    )


def _find() -> Path:
    files = [f"{name}.gz" for name in SHA256]
    return debian.find_files(TITLE, files, package=PACKAGE, system=SYSTEM, cache=cache_folder())


def _read(file: Path, expected: str) -> NDArray[np.uint8]:
    raw = gzip.decompress(debian.read_file(TITLE, file, expected))
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4).astype(int)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)
