"""Fashion-MNIST's files, with tiny stand-ins of the same format."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from slimfuse.data import fashion_mnist
from slimfuse.errors import DataError

SIZES = {"train": 5, "t10k": 3}


def idx(values: np.ndarray) -> bytes:  # type: ignore[type-arg]
    """Return uint8 values as a gzipped IDX file (its header is big-endian)."""
    header = bytes([0, 0, 8, values.ndim])
    header += b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return gzip.compress(header + values.tobytes())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write tiny files under the published names, and expect their digests."""
    random = np.random.default_rng(0)
    for part, n in SIZES.items():
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for name, values in (
            (f"{part}-images-idx3-ubyte", images),
            (f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) * 3 % 10),
        ):
            packed = idx(values)
            (tmp_path / f"{name}.gz").write_bytes(packed)
            monkeypatch.setitem(fashion_mnist.SHA256, name, hashlib.sha256(packed).hexdigest())
    return tmp_path


def test_images_and_labels_are_read_as_written(files: Path) -> None:
    data = fashion_mnist.load_fashion_mnist(str(files))
    random = np.random.default_rng(0)
    for split, n in ((data.train, 5), (data.test, 3)):
        grey = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        assert len(split) == len(split.items) == n
        for i in range(n):
            assert np.array_equal(split.items[i], np.stack([grey[i]] * 3, axis=-1))
        assert split.labels.tolist() == [3 * i % 10 for i in range(n)]
    assert len(data.classes) == 10 and data.image_size == 28


def test_an_altered_file_is_refused(files: Path) -> None:
    file = files / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(idx(np.array([1, 2, 4], dtype=np.uint8)))
    with pytest.raises(DataError, match="not the published one") as caught:
        fashion_mnist.load_fashion_mnist(str(files))
    assert caught.value.where == str(file)


def test_a_missing_file_is_named(files: Path) -> None:
    (files / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match="missing") as caught:
        fashion_mnist.load_fashion_mnist(str(files))
    assert str(caught.value.where).endswith("train-images-idx3-ubyte.gz")


def test_the_fingerprint_follows_the_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fashion_mnist.load_fashion_mnist(str(files)).fingerprint
    packed = idx(np.array([1, 2, 4], dtype=np.uint8))
    (files / "t10k-labels-idx1-ubyte.gz").write_bytes(packed)
    digest = hashlib.sha256(packed).hexdigest()
    monkeypatch.setitem(fashion_mnist.SHA256, "t10k-labels-idx1-ubyte", digest)
    assert fashion_mnist.load_fashion_mnist(str(files)).fingerprint != first


def test_unpacked_files_in_the_cache_are_found_without_a_path(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM", files / "not-installed")
    monkeypatch.setattr(fashion_mnist, "cache_folder", lambda: files)
    assert len(fashion_mnist.load_fashion_mnist().train) == 5


def test_without_the_package_and_without_apt_the_next_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "not-installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="was not found") as caught:
        fashion_mnist.load_fashion_mnist()
    assert fashion_mnist.PACKAGE in str(caught.value.hint)
    assert "data.path" in str(caught.value.hint)
