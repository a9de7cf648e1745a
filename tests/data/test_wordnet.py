"""WordNet's glosses: a handmade file of the same format, and the published one where it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from slimfuse.data import load_wordnet, wordnet
from slimfuse.errors import DataError

# changes only if our reading or our split does: the published file is pinned
FINGERPRINT = "9fdc88a2ffbe3ff41e3e48b301517fc950c7645587f0e787381fbab6cc3a5082"

LICENCE = "  1 This software and database is being provided to you\n  2 | by | Princeton\n"
REPEATED = ("one species", "One Species")  # alike for a tokenizer without upper case


def line(file: int, gloss: str) -> str:
    return f"00001740 {file:02} n 01 thing 0 001 @ 00002137 n 0000 | {gloss}  \n"


def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write 6 glosses of every class and a top of the hierarchy, and expect their digest."""
    rows = [line(3, "that which is known")]
    rows += [
        line(file, f'caf\xe9 {i} of {file}; it has | two parts; "an example"; "another"')
        for file in range(4, 29)
        for i in range(5)
    ]
    rows += [line(file, REPEATED[file % 2]) for file in range(4, 29)]
    content = (LICENCE + "".join(rows)).encode("latin-1")
    (folder / "data.noun").write_bytes(content)
    monkeypatch.setitem(wordnet.SHA256, "data.noun", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(wordnet, "TEST_SIZE", 50)
    return folder


def test_a_gloss_is_the_definition_and_its_class_the_lexicographer_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_wordnet(str(write(tmp_path, monkeypatch)))
    assert len(data.classes) == 25
    assert (data.classes[0], data.classes[14], data.classes[-1]) == (
        "noun.act", "noun.person", "noun.time",
    )  # fmt: skip
    for split in (data.train, data.test):
        for text, label in zip(split.items, split.labels, strict=True):
            if text not in REPEATED:
                assert text.split(";") == [f"café {text[5]} of {label + 4}", " it has | two parts"]


def test_the_split_is_stratified_complete_and_repeats_no_gloss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_wordnet(str(write(tmp_path, monkeypatch)))
    assert (len(data.train), len(data.test)) == (100, 50)
    assert np.bincount(data.test.labels).tolist() == [2] * 25
    assert sum(text in REPEATED for text in data.train.items) == 25
    assert not set(data.test.items) & {*data.train.items, *REPEATED}
    again = load_wordnet(str(tmp_path))
    assert again.fingerprint == data.fingerprint
    assert list(again.test.items) == list(data.test.items)


def test_an_altered_and_a_missing_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, monkeypatch) / "data.noun"
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match="not the published one") as caught:
        load_wordnet(str(tmp_path))
    assert caught.value.where == str(file)
    file.unlink()
    with pytest.raises(DataError, match="a WordNet file is missing"):
        load_wordnet(str(tmp_path))


def test_unpacked_files_in_the_cache_are_found_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wordnet, "SYSTEM", tmp_path / "not-installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wordnet.cache_folder().mkdir(parents=True)
    write(wordnet.cache_folder(), monkeypatch)
    assert len(load_wordnet().test) == 50


def test_without_the_package_and_without_apt_the_next_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wordnet, "SYSTEM", tmp_path / "not-installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="WordNet was not found") as caught:
        load_wordnet()
    assert "wordnet-base" in str(caught.value.hint)


def test_the_published_file_gives_its_glosses() -> None:
    folders = [f for f in (wordnet.SYSTEM, wordnet.cache_folder()) if (f / "data.noun").is_file()]
    if not folders:
        pytest.skip("the Debian package wordnet-base is neither installed nor in the cache")
    data = load_wordnet(str(folders[0]))
    assert (len(data.train), len(data.test)) == (74_064, 8_000)
    test = {text.casefold() for text in data.test.items}
    assert len(test) == 8_000 and not test & {text.casefold() for text in data.train.items}
    assert data.test.labels.min() == 0 and len(set(data.test.labels.tolist())) == 25
    assert data.fingerprint == FINGERPRINT
