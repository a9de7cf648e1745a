"""Prose and ratings: handmade files of the published form, the published ones where they are."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from slimfuse.data import anarchism, load_anarchism, load_vader, vader
from slimfuse.errors import DataError

# change only if our reading or our split does: the published files are pinned
ANARCHISM = "0e1b35f321991a4afa44a2ee60bfe11fbb0b77690e45e209e2e56020741de0f9"
VADER = "62027ffd3f17c3848ad1b992e20d73a7c49eb2f3ba0117a80e9552d319ec865d"

PAGE = """<!DOCTYPE html><html><head><title>Not {n}</title><style>p {{}}</style></head>
<body><h1>Chapter {n}</h1><p>It has <i>two</i>
lines &amp; an &#233;.</p>words beside<ul><li>one</li><li>Shared</li></ul><p> </p></body></html>"""


def chapters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write five chapters and other pages, and expect their digest."""
    names = ["secAint", "secA2", "secA10", "secAcon", "secB1"]
    digest = hashlib.sha256()
    for name in names:
        content = PAGE.format(n=name).encode()
        (folder / f"{name}.html").write_bytes(content)
        digest.update(b"%b.html %d\n%b" % (name.encode(), len(content), content))
    (folder / "secA2.md").write_text("no page")
    (folder / "append1.html").write_text(PAGE)
    monkeypatch.setattr(anarchism, "SHA256", digest.hexdigest())
    monkeypatch.setattr(anarchism, "TEST_EVERY", 3)
    return folder


def test_prose_is_the_paragraphs_of_chapters_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_anarchism(str(chapters(tmp_path, monkeypatch)))
    body = ["It has two lines & an é.", "words beside", "one", "Shared"]
    parts = [[f"Chapter {n}", *body] for n in ("secAint", "secA2", "secAcon", "secB1")]
    assert list(data.train.items) == [p for part in parts for p in part]
    assert list(data.test.items) == ["Chapter secA10"]  # all else stands in another chapter, too
    assert (data.kind, data.classes, data.name) == ("none", (), "anarchism")


def test_altered_chapters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chapters(tmp_path, monkeypatch)
    (folder / "secB1.html").unlink()
    with pytest.raises(DataError, match="missing or not the published ones") as caught:
        load_anarchism(str(folder))
    assert str(caught.value.got).startswith("4 chapters")


def test_published_prose() -> None:
    places = (anarchism.SYSTEM, anarchism.cache_folder())
    folders = [f for f in places if (f / anarchism.ENDS[0]).is_file()]
    if not folders:
        pytest.skip("the Debian package anarchism is neither installed nor in the cache")
    data = load_anarchism(str(folders[0]))
    assert (len(data.train), len(data.test)) == (9957, 436)
    assert not set(data.test.items) & set(data.train.items)
    assert sum(map(len, data.train.items)) == 7_100_915
    assert data.fingerprint == ANARCHISM


FILMS = "1\t2.25\tA film, naïve\r\n2\t-0.5\tTwice\r\n3\t1\tOne\twith a tab\r\n"
GOODS = "".join(f"{i}_{j}\t{i - 3}\tgood {i} part {j}\r\n" for i in range(1, 8) for j in (1, 2))
GOODS += "8_1\t0\ttwice\r\n"


def ratings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in zip(vader.SHA256, (FILMS, GOODS), strict=True):
        (folder / name).write_bytes(text.encode())
        monkeypatch.setitem(vader.SHA256, name, hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(vader, "TEST_SHARE", 0.4)
    return folder


def test_ratings_are_split_by_reviews_and_no_text_is_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_vader(str(ratings(tmp_path, monkeypatch)))
    assert (data.kind, data.classes) == ("regression", ("rating",))
    found = {}
    for split in (data.train, data.test):
        assert split.labels.dtype == np.float32
        found |= dict(zip(split.items, split.labels.tolist(), strict=True))
    assert found["A film, naïve"] == 2.25 and found["good 7 part 2"] == 4
    assert found["One\twith a tab"] == 1
    assert {"Twice", "twice"} <= set(data.train.items)
    reviews = [{t.split(" part ")[0] for t in s.items} for s in (data.train, data.test)]
    assert not reviews[0] & reviews[1] and len(reviews[1]) == round(0.4 * 11)


def packed(folder: Path) -> bytes:
    """Return a source archive as the published one is made: an archive inside an archive."""

    def tar(members: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    inner = tar({f"hutto_ICWSM_2014/{n}": (folder / n).read_bytes() for n in vader.SHA256})
    return tar({f"vaderSentiment-3.3.2/{vader.INNER}": inner})


def test_the_source_archive_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ratings(tmp_path, monkeypatch)
    wanted = load_vader(str(folder)).fingerprint
    other = tmp_path / "other"
    other.mkdir()
    (other / vader.ARCHIVE).write_bytes(packed(folder))
    assert load_vader(str(other)).fingerprint == wanted


def test_pip_fetches_the_archive_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(ratings(tmp_path, monkeypatch))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def run(command: list[str], **options: object) -> None:
        calls.append(command)
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert wanted == f"vaderSentiment==3.3.2 --hash=sha256:{vader.ARCHIVE_SHA256}\n"
        (Path(command[-1]) / vader.ARCHIVE).write_bytes(archive)

    monkeypatch.setattr("subprocess.run", run)
    assert load_vader().fingerprint == load_vader().fingerprint
    assert len(calls) == 1
    assert sorted(f.name for f in vader.cache_folder().iterdir()) == sorted(vader.SHA256)


def test_ratings_that_cannot_be_fetched_or_were_altered_tell_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(DataError, match="could not be fetched with pip") as caught:
        load_vader()
    assert "data.path" in str(caught.value.hint) and not vader.cache_folder().exists()
    folder = ratings(tmp_path, monkeypatch)
    (folder / next(iter(vader.SHA256))).write_text("1\t0\tother\n")
    with pytest.raises(DataError, match="not the published one"):
        load_vader(str(folder))


def test_published_ratings() -> None:
    folder = vader.cache_folder()
    if not all((folder / name).is_file() for name in vader.SHA256):
        pytest.skip("the sources of vaderSentiment are not in the cache")
    data = load_vader(str(folder))
    assert (len(data.train), len(data.test)) == (11_588, 2_725)
    assert not {t.casefold() for t in data.train.items} & {t.casefold() for t in data.test.items}
    assert data.train.labels.min() >= -4 and data.train.labels.max() <= 4
    assert data.fingerprint == VADER
