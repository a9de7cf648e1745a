"""The run folder: stages by content, whole or not at all, one process at a time."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import events, folder_bytes

from slimfuse.errors import StorageError
from slimfuse.store import CHECKPOINT, LOCK, MANIFEST, Stage, Store, digest, free_bytes, write_text


def writer(text: str = "content") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "file.txt").write_text(text)

    return build


def never(_folder: Path) -> None:
    raise AssertionError("a finished stage was built again")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


def made(store: Store, text: str = "content") -> Stage:
    store.root.mkdir(exist_ok=True)
    return store.stage("x", {"text": text}, writer(text))


def test_a_stage_is_built_once(store: Store) -> None:
    first = made(store)
    assert (first.path / "sub" / "file.txt").read_text() == "content"
    assert store.stage("x", {"text": "content"}, never) == first
    assert Store(store.root).stage("x", {"text": "content"}, never) == first
    assert events(store.root, "start") == ["x"]
    assert events(store.root, "cached") == ["x"]  # told once a process


def test_the_key_is_the_inputs_in_any_order(store: Store) -> None:
    store.root.mkdir()
    inputs = {"a": 1, "b": {"c": [1, 2], "d": None}}
    first = store.stage("x", inputs, writer())
    turned = {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert Store(store.root).stage("x", turned, never) == first
    others: list[dict[str, object]] = [
        {**inputs, "a": 2},
        {**inputs, "b": {"c": [2, 1], "d": None}},
        {"a": 1},
    ]
    keys = {store.stage("x", other, writer()).key for other in others}
    assert len(keys | {first.key, store.stage("y", inputs, writer()).key}) == 5


def test_a_key_holds_no_value_that_json_lacks() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"lr": float("nan")})


@pytest.mark.parametrize("damage", ["altered", "missing", "manifest", "truncated", "no manifest"])
def test_a_damaged_stage_is_noticed_and_rebuilt(store: Store, damage: str) -> None:
    stage = made(store)
    file, manifest = stage.path / "sub" / "file.txt", stage.path / MANIFEST
    match damage:
        case "altered":
            file.write_text("contenT")
        case "missing":
            file.unlink()
        case "manifest":
            manifest.write_text(json.dumps({"files": {}}))
        case "truncated":
            manifest.write_text(manifest.read_text()[:20])
        case "no manifest":
            manifest.unlink()
    again = made(Store(store.root))
    assert file.read_text() == "content"
    assert again.files == stage.files
    assert events(store.root, "start") == ["x", "x"]
    assert events(store.root, "altered") == [stage.path.name]


def test_a_file_that_a_file_manager_adds_costs_nothing(store: Store) -> None:
    stage = made(store)
    (stage.path / ".DS_Store").write_text("not ours")
    again = Store(store.root).stage("x", {"text": "content"}, never)
    assert set(folder_bytes(store.publish(again, "model"))) == {"sub/file.txt"}


def test_of_an_unfinished_stage_only_the_checkpoint_stays(store: Store) -> None:
    store.root.mkdir()

    def stops(folder: Path) -> None:
        for name in (CHECKPOINT, "checkpoint.writing", MANIFEST, "left.txt"):
            (folder / name).write_text("left")
        writer()(folder)
        raise KeyboardInterrupt

    def goes_on(folder: Path) -> None:
        assert {f.name for f in folder.iterdir()} == {CHECKPOINT}
        writer()(folder)

    with pytest.raises(KeyboardInterrupt):
        store.stage("x", {}, stops)
    (left,) = (store.root / "stages").iterdir()
    assert left.suffix == ".partial"
    stage = store.stage("x", {}, goes_on)
    assert set(stage.files) == {"sub/file.txt"}
    assert not (stage.path / CHECKPOINT).exists()


def test_a_kill_after_the_work_keeps_the_checkpoint(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.root.mkdir()

    def trains(folder: Path) -> None:
        (folder / CHECKPOINT).write_text("all steps")
        writer()(folder)

    def stops(_folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimfuse.store._sync", stops)
    with pytest.raises(KeyboardInterrupt):
        store.stage("x", {}, trains)
    (left,) = (store.root / "stages").iterdir()
    assert (left / CHECKPOINT).read_text() == "all steps"


def test_publishing_replaces_the_whole_folder(store: Store) -> None:
    store.publish(made(store, "first"), "model")
    (store.root / "model" / "extra").write_text("not ours")
    for name in ("publish-model.partial", "withdraw-model.partial"):  # as a kill leaves them
        (store.root / "stages" / name).mkdir()
        (store.root / "stages" / name / "half").write_text("half")
    (store.root / "model.old").mkdir()  # someone's own
    second = made(store, "second")
    assert folder_bytes(store.publish(second, "model")) == second.files
    assert not list((store.root / "stages").glob("*.partial"))
    assert (store.root / "model.old").is_dir()


def test_publishing_the_same_again_touches_nothing(store: Store) -> None:
    stage = made(store)
    before = store.publish(stage, "model").stat()
    after = store.publish(stage, "model").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_withdrawing_what_is_not_there_is_no_error(store: Store) -> None:
    store.root.mkdir()
    store.withdraw("model", "report.json")
    assert list(store.root.iterdir()) == []


def test_one_process_at_a_time(store: Store) -> None:
    with store.lock():
        with (
            pytest.raises(StorageError, match="another slimfuse process") as error,
            Store(store.root).lock(),
        ):
            pass
        assert error.value.where == str(store.root) and error.value.hint
    with Store(store.root).lock():  # free again
        pass


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "can't be written"),
        (errno.EACCES, "can't be written"),
    ],
)
def test_a_failing_disk_is_one_clear_error(store: Store, code: int, what: str) -> None:
    store.root.mkdir()

    def fails(folder: Path) -> None:
        raise OSError(code, "the system's words", str(folder / "file"))

    with pytest.raises(StorageError, match=what) as error:
        store.stage("x", {}, fails)
    assert error.value.where == str(store.root) and error.value.hint


def test_a_text_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "report.json"
    write_text(file, "first")

    def fails(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(StorageError, match="the disk is full"):
        write_text(file, "second")
    assert file.read_text() == "first"


def test_room_is_told_for_a_folder_that_is_yet_to_be_made(store: Store) -> None:
    assert free_bytes(store.root / "deep" / "er") == pytest.approx(
        free_bytes(Path("/tmp")), rel=0.5
    )
    old = made(store, "old")
    assert store.used_bytes("a lock") == 0
    write_text(store.root / LOCK, "a lock")
    for file in old.path.rglob("*"):
        os.utime(file, (0, 0))
    assert store.used_bytes("a lock") == 0  # made for another run
    made(store)
    assert store.used_bytes("a lock") > len("content")
    assert store.used_bytes("another") == 0
    assert free_bytes(old.path) > 0


def test_a_folder_where_a_file_is_to_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(StorageError, match="a file is to be written here"):
        write_text(tmp_path / "page.html", "x")
    assert [f.name for f in tmp_path.iterdir()] == ["page.html"]  # and nothing half-written
