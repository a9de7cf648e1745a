"""Killed at any moment, the same command goes on and ends with the same bytes."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import die, events, folder_bytes, in_child, undrawn, unproved, was_killed

from slimfuse.finetune import loop
from slimfuse.moments import Moments
from slimfuse.onnx import export_onnx
from slimfuse.pipeline import Run, compress, deployment
from slimfuse.pipeline import run as story
from slimfuse.store import MANIFEST, Store

RESULTS = ("model", "report.json", "report.html")
TRAINED = ("parent-", "finetuned")


@pytest.fixture
def run(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs the recipe in a child which `arm()` may have prepared to die."""
    unproved(monkeypatch)
    undrawn(monkeypatch)

    def start(arm: Callable[[], object] = lambda: None) -> int:
        complaints = tmp_path / "complaints"

        def work() -> None:
            arm()
            compress(tiny_recipe, out=tmp_path / "run")

        status = in_child(work, complaints)
        assert was_killed(status) or status == 0, complaints.read_text()
        return status

    return start


def patch(owner: Any, name: str, before: Callable[..., object]) -> None:
    """Let a function of this process do something before its work."""
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def at_start(stage: str) -> None:
    """Die when a stage has just begun."""

    def check(_store: Store, name: str, event: str, **_more: Any) -> None:
        if (name, event) == (stage, "start"):
            die()

    patch(Store, "log", check)


def when_whole(stage: str) -> None:
    """Die when a stage's files are all written, but it has not got its name yet."""

    def check(folder: Path, _target: Path) -> None:
        if folder.suffix == ".partial" and folder.name.rpartition("-")[0] == stage:
            die()

    patch(Path, "rename", check)


def after_checkpoint(stage: str) -> None:
    """Die in the middle of training, one step after a checkpoint was written."""
    loop.CHECKPOINT_SECONDS = 0.0
    written: list[Path] = []

    def check(path: Path, *_: Any) -> None:
        if path.parent.name.rpartition("-")[0] == stage:
            if written:
                die()
            written.append(path)

    patch(loop, "save", check)


@pytest.mark.slow  # minutes: the quick twin is below
def test_killed_in_every_stage_it_ends_with_the_same_bytes(
    run: Callable[..., int], finished: Run, tmp_path: Path
) -> None:
    root, used = tmp_path / "run", tmp_path / "restored"
    stages = events(finished.folder, "start")
    assert len(stages) > 15  # every kind of stage is met
    trained = [stage for stage in stages if stage.startswith(TRAINED)]
    for stage in stages:
        points = [at_start, after_checkpoint, when_whole]
        for point in points if stage in trained else (at_start, when_whole):

            def arm(point: Callable[[str], None] = point, stage: str = stage) -> None:
                patch(loop, "restore", lambda path, *_: note(used, path))
                point(stage)

            assert was_killed(run(arm)), f"{point.__name__} of {stage} was never met"
            assert not [name for name in RESULTS if (root / name).exists()]
            for folder in (root / "stages").iterdir():
                assert folder.suffix == ".partial" or (folder / MANIFEST).is_file()
    assert run() == 0
    assert folder_bytes(root / "model") == folder_bytes(finished.model)
    assert not list(root.rglob("*.partial"))
    assert used.read_text().split() == trained  # went on from each checkpoint, once
    assert not events(root, "altered")  # what a kill left behind is in no stage


def note(file: Path, checkpoint: Path) -> None:
    """Write down the stage that goes on from a checkpoint."""
    with file.open("a") as lines:
        lines.write(checkpoint.parent.name.rpartition("-")[0] + "\n")


def test_killed_at_every_step_of_publishing_nothing_is_half(
    run: Callable[..., int],
    finished: Run,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished.folder, root)
    publish, last = story.publish, []
    # what a run publishes last is caught once, so that every try does that alone
    with monkeypatch.context() as caught:
        caught.setattr(story, "publish", lambda *given: last.append(given) or publish(*given))
        compress(tiny_recipe, out=root)
    new = folder_bytes(finished.model)
    for count in itertools.count(1):
        shutil.rmtree(root / "model", ignore_errors=True)
        shutil.copytree(finished.model, root / "model")
        (root / "model" / "config.json").write_text("an earlier one's")
        (root / "model" / "onnx" / "earlier.onnx").write_text("an earlier one's")
        old = folder_bytes(root / "model")
        for report in ("report.json", "report.html"):
            (root / report).write_text("earlier")

        def once(count: int = count) -> None:
            at_change(count, root)
            publish(*last[0])

        status = in_child(once, tmp_path / "complaints")
        assert was_killed(status) or status == 0, (tmp_path / "complaints").read_text()
        found = folder_bytes(root / "model")
        reports = [(root / r).read_text() for r in ("report.json", "report.html")
                   if (root / r).exists()]  # fmt: skip
        assert found in ({}, old, new)
        if found != old:
            assert "earlier" not in reports
        if found != new:
            assert set(reports) <= {"earlier"}
        assert all(text == "earlier" or text[0] + text[-1] in ("{\n", "<>") for text in reports)
        if status == 0:
            break
    assert count > 15  # folders were copied, renamed and removed one change at a time
    assert found == new
    (root / "model" / "config.json").write_text("an earlier one's")
    # a whole command meets the same moments, and mends what they left
    assert was_killed(run(lambda: at_change(count // 2, root, begun=False))) and run() == 0
    assert folder_bytes(root / "model") == new
    assert {path.name for path in root.iterdir()} == {
        path.name for path in finished.folder.iterdir()
    }


def at_change(count: int, root: Path, *, begun: bool = True) -> None:
    """Die before the n-th change that is made to the run folder once the last stage is there.

    begun: whether that stage is there already.
    """
    seen = itertools.count(1)
    watched = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile")
    state = {"publishing": begun}

    def last(_store: Store, name: str, _event: str, **_more: Any) -> None:
        state["publishing"] = state["publishing"] or name == "bench"

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wx"
        ours = event in watched or (writes and str(args[0]).startswith(str(root)))
        if state["publishing"] and ours and next(seen) == count:
            die()

    patch(Store, "log", last)
    sys.addaudithook(hook)


def test_an_interrupted_run_goes_on(
    run: Callable[..., int], finished: Run, tmp_path: Path, tiny_recipe: Path
) -> None:
    def interrupt() -> None:
        def check(*_: Any) -> None:
            raise KeyboardInterrupt

        patch(loop, "batch_indices", check)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_recipe, out=tmp_path / "run")
        die()

    assert was_killed(run(interrupt))
    assert events(tmp_path / "run", "start") == ["parent-a"]
    assert run(lambda: at_start("onnx-child"))
    assert events(tmp_path / "run", "done")[0] == "parent-a"
    weights = next((tmp_path / "run" / "stages").glob("finetuned-????????????????"))
    assert (weights / "model.safetensors").read_bytes() == (
        finished.model / "model.safetensors"
    ).read_bytes()


def calls(owner: Any, name: str, kill_at: int) -> Callable[[], None]:
    """Return what lets a process die at the n-th call of a function, counted from 1."""

    def arm() -> None:
        count = itertools.count(1)

        def check(*_: Any, **__: Any) -> None:
            if next(count) == kill_at:
                die()

        patch(owner, name, check)

    return arm


def after(stage: str, seconds: float) -> Callable[[], None]:
    """Return what lets a process die some time after a stage has begun, wherever it then is."""

    def arm() -> None:
        def begin(_store: Store, name: str, event: str, **_more: Any) -> None:
            if (name, event) == (stage, "start"):
                deployment.export_onnx = export_onnx  # in earnest, not the copy of a known file
                signal.signal(signal.SIGALRM, lambda *_: die())
                signal.setitimer(signal.ITIMER_REAL, seconds)
            elif name == stage:
                signal.setitimer(signal.ITIMER_REAL, 0)

        patch(Store, "log", begin)

    return arm


STEPS, PASSES = 10, 14  # of the tiny run: of its finetuning, and of sums while it is fused


def test_killed_five_times_each_while_fusing_finetuning_and_exporting(
    run: Callable[..., int], finished: Run, tmp_path: Path
) -> None:
    draw, root = random.Random(0), tmp_path / "run"
    loop.CHECKPOINT_SECONDS = 60.0  # as users have it
    for point in sorted(draw.sample(range(1, PASSES), 5)):
        assert was_killed(run(calls(Moments, "update", point)))
    assert events(root, "start").count("fused") == 5 and "fused" not in events(root, "done")
    for point in sorted(draw.sample(range(1, STEPS + 1), 5)):
        target = draw.choice(["_gradients", "watch"])  # amid a step, or behind it
        assert was_killed(run(armed_from("finetuned", loop._Run, target, point)))
    assert "finetuned" not in events(root, "done")
    seconds = json.loads(
        next((finished.folder / "stages").glob("onnx-child-*" + f"/{MANIFEST}")).read_text()
    )["seconds"]
    killed = 0
    for share in sorted(draw.random() for _ in range(5)):
        killed += was_killed(run(after("onnx-child", share * seconds)))
    assert killed  # the others were faster than their time
    assert run() == 0
    assert folder_bytes(root / "model") == folder_bytes(finished.model)
    assert not list(root.rglob("*.partial"))


def armed_from(stage: str, owner: Any, name: str, kill_at: int) -> Callable[[], None]:
    """Return what lets a process die at the n-th call of a function behind a stage's start."""

    def arm() -> None:
        def begin(_store: Store, begun: str, event: str, **_more: Any) -> None:
            if (begun, event) == (stage, "start"):
                calls(owner, name, kill_at)()

        patch(Store, "log", begin)

    return arm
