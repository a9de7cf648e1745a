"""WordNet 3.0's noun glosses from the Debian package `wordnet-base`.

Copyright 2006 Princeton University; the WordNet 3.0 licence permits use, copying, changing and
distribution for any purpose, free of charge, with its notice (the package's `copyright` file).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimfuse.data import cache, debian
from slimfuse.data.base import Split, TextData
from slimfuse.data.texts import text_data

SHA256 = {"data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"}
TITLE = "WordNet"
PACKAGE = "wordnet-base"
SYSTEM = Path("/usr/share/wordnet")
CLASSES = tuple(
    f"noun.{name}"
    for name in (
        "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event",
        "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon",
        "plant", "possession", "process", "quantity", "relation", "shape", "state", "substance",
        "time",
    )
)  # fmt: skip
FIRST = 4  # the lexicographer file noun.act; file 3 holds the hierarchy's 51 tops
TEST_SIZE = 8_000


def cache_folder() -> Path:
    """Return the per-user folder the package is unpacked into when it isn't installed."""
    return cache.cache_folder("wordnet")


def load_wordnet(path: str | None = None) -> TextData:
    """Return 74 064 training and 8 000 test glosses of nouns, in 25 classes.

    A gloss is the definition without its examples, "a person suffering from neurosis"; its class
    is the lexicographer file of its noun, noun.act … noun.time. The split is seeded and stratified
    by class, and no test gloss stands anywhere else, whatever its letters' case. Looks in `path`,
    else in the installed package's folder, else unpacks the package (no root needed) into the
    user's cache. Raises DataError when the file is missing or altered.
    """
    folder = Path(path) if path else _find()
    ((name, sha256),) = SHA256.items()
    raw = debian.read_file(TITLE, folder / name, sha256)
    glosses, labels = _parse(raw.decode("latin-1"))
    train, test = (
        Split([glosses[i] for i in chosen], labels[chosen]) for chosen in _split(glosses, labels)
    )
    return text_data("wordnet", train, test, CLASSES)


def _find() -> Path:
    return debian.find_files(TITLE, SHA256, package=PACKAGE, system=SYSTEM, cache=cache_folder())


def _parse(text: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the glosses and their classes; format: wndb(5), of which the licence is indented."""
    glosses, labels = [], []
    for line in text.splitlines():
        if line.startswith("  "):
            continue
        fields, gloss = line.split(" | ", 1)
        label = int(fields.split(" ", 2)[1]) - FIRST
        if label >= 0:
            glosses.append(gloss.split('; "', 1)[0].strip())
            labels.append(label)
    return glosses, np.array(labels, dtype=np.int64)


def _split(
    glosses: list[str], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the training and the test places, each in the file's order."""
    from sklearn.model_selection import train_test_split

    known = [gloss.casefold() for gloss in glosses]
    count = Counter(known)
    single = np.array([i for i, gloss in enumerate(known) if count[gloss] == 1])
    _, test = train_test_split(single, test_size=TEST_SIZE, stratify=labels[single], random_state=0)
    test = np.sort(test)
    return np.setdiff1d(np.arange(len(labels)), test), test
