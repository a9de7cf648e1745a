"""`sweep --ray`: the same runs from other processes, errors from there, machines that die."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import SHALLOW_ALONE
from tiny_run import events, folder_bytes, in_child, recipe, undrawn, unproved, write_recipe

from slimfuse import cli, cluster
from slimfuse.cluster import Answer, answer, calling, unpacked
from slimfuse.errors import CheckFailed, UserError
from slimfuse.pipeline import Sweep, sweep, sweep_machines
from slimfuse.store import Store

VARY = ("finetune.epochs=1,2",)
NAMES = ["epochs=1", "epochs=2"]
Swept = tuple[Path, Sweep]


def spec() -> dict[str, Any]:
    return recipe(
        parents=SHALLOW_ALONE,
        data={"limit": {"train": 100, "test": 40}},
        fuse={"method": "select"},  # seconds less than a refit and its control
        export={"quantize": {"mode": "none"}},
        baselines=[],
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """A recipe and its sweep in one process; no folder is proved by another interpreter."""
    root = tmp_path_factory.mktemp("serial")
    path = write_recipe(root / "tiny.yaml", spec())
    with pytest.MonkeyPatch.context() as patch:
        unproved(patch)
        undrawn(patch)
        yield path, sweep(path, vary=VARY, out=root / "out")


@pytest.fixture
def copied(swept: Swept, tmp_path: Path) -> Path:
    """A copy of the finished sweep's folder."""
    return Path(shutil.copytree(swept[1].folder, tmp_path / "copy"))


def forked(
    _address: str, entry: str, calls: Mapping[str, Mapping[str, Any]], **more: Any
) -> Iterator[Answer]:
    """Answer as a cluster would whose machines are forks of this process."""
    more["before"]()
    for name, given in calls.items():
        complaints = Path(more["log"]).with_name("complaints")

        def work(given: Mapping[str, Any] = given) -> None:
            error = answer(entry, given)
            if error is not None:
                raise unpacked(error)

        status = in_child(work, complaints)
        assert status == 0, complaints.read_text()
        yield Answer(name, "here", None)


def failing(errors: Mapping[str, Exception]) -> Callable[..., Iterator[Answer]]:
    def answered(
        _address: str, _entry: str, calls: Mapping[str, Any], **_: Any
    ) -> Iterator[Answer]:
        for name in calls:
            yield Answer(name, "there", errors.get(name))

    return answered


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["slimfuse", "sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert isinstance(done.value.code, int)
    return done.value.code


# -- the same runs --------------------------------------------------------------------------------


def test_other_processes_make_the_same_runs_and_what_is_shared_once(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, serial = swept
    monkeypatch.setattr(sweep_machines, "answered", forked)
    found = sweep(path, vary=VARY, ray="auto", out=tmp_path / "out")
    assert list(found.runs) == NAMES
    for name, run in found.runs.items():
        assert folder_bytes(run.model) == folder_bytes(serial.runs[name].model)
    logs = [tmp_path / "out", *(run.folder for run in found.runs.values())]
    started = sorted(stage for log in logs for stage in events(log, "start"))
    logs = [serial.folder, *(run.folder for run in serial.runs.values())]
    assert started == sorted(stage for log in logs for stage in events(log, "start"))
    assert started.count("parent-a") == started.count("bench") == 1
    assert started.count("fused") == 1  # made by the first that needs it
    assert not (tmp_path / "out" / sweep_machines.MARK).exists()


def test_a_machine_with_another_recipe_refuses(
    swept: Swept, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any] | None] = []

    def altered(_: str, entry: str, calls: Mapping[str, Any], **more: Any) -> Iterator[Answer]:
        more["before"]()
        given = calls[NAMES[0]] | {"overrides": ["finetune.epochs=3"]}
        here = Path.cwd()
        told.append(answer(entry, given))
        os.chdir(here)
        assert told[0] is not None
        yield Answer(NAMES[0], "there", unpacked(told[0]))

    monkeypatch.setattr(sweep_machines, "answered", altered)
    with pytest.raises(UserError, match="other inputs or versions") as error:
        sweep(swept[0], vary=VARY, ray="auto", out=copied)
    assert (error.value.got, error.value.allowed) == ("epochs: 3.0", "epochs: 1.0")


def test_a_failed_check_leaves_the_candidate_out_and_another_error_ends_the_sweep(
    swept: Swept, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = failing({NAMES[1]: CheckFailed("it gives other answers", got="nan")})
    monkeypatch.setattr(sweep_machines, "answered", failed)
    found = sweep(swept[0], vary=VARY, ray="auto", out=copied)
    assert list(found.runs) == NAMES[:1]
    assert found.report.warnings[0].startswith(f"{NAMES[1]} is left out: it gives other answers")
    ended = failing({NAMES[1]: UserError("the disk is full")})
    monkeypatch.setattr(sweep_machines, "answered", ended)
    with pytest.raises(UserError, match="the disk is full") as error:
        sweep(swept[0], vary=VARY, ray="auto", out=copied)
    assert error.value.where == NAMES[1]


def test_a_stage_that_two_processes_want_is_built_once(tmp_path: Path) -> None:
    """The other process holds the stage until it is whole; this one finds it."""
    begun, go = tmp_path / "begun", tmp_path / "go"

    def build(folder: Path) -> None:
        begun.touch()
        while not go.exists():
            time.sleep(0.01)
        (folder / "file").write_text("theirs")

    def not_here(_: Path) -> None:
        raise AssertionError("built twice")

    pid = os.fork()
    if pid == 0:
        Store(tmp_path / "run", crowded=True).stage("a", {}, build)
        os._exit(0)
    while not begun.exists():
        time.sleep(0.01)
    helper = os.fork()
    if helper == 0:
        time.sleep(0.3)
        go.touch()
        os._exit(0)
    stage = Store(tmp_path / "run", crowded=True).stage("a", {}, not_here)
    assert (stage.path / "file").read_text() == "theirs"
    assert [os.waitpid(child, 0)[1] for child in (pid, helper)] == [0, 0]


# -- errors ---------------------------------------------------------------------------------------


def test_our_errors_come_back_whole_and_faults_with_their_traceback() -> None:
    sent = CheckFailed("no", where="here", got=3, allowed=[1, 2], hint="go")
    back = unpacked(cluster.packed(sent))
    assert type(back) is CheckFailed and str(back) == str(sent) and back.exit_code == 3
    error = answer("slimfuse.cluster:unpacked", {"values": {}})
    assert error is not None and error["kind"] == "KeyError"
    fault = unpacked(error)
    assert str(fault) == "KeyError: 'kind'" and "Traceback" in fault.__notes__[0]
    assert answer("slimfuse.pipeline.sweep_task:hello", {}) is None


@pytest.mark.parametrize("address", ["", "ray://host:1", "host", ":6379", "host:port", "ray://h"])
def test_an_address_that_can_be_none_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_cli(monkeypatch, "none.yaml", "--set", VARY[0], "--ray", address)
    shown = capsys.readouterr().err
    assert code == 2 and "not the address of a Ray cluster" in shown and "local" in shown


def test_without_ray_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calling, "find_spec", lambda _: None)
    assert run_cli(monkeypatch, "none.yaml", "--set", VARY[0], "--ray", "auto") == 2
    assert "pip install 'slimfuse[ray]'" in capsys.readouterr().err


def test_a_search_is_refused(swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "find_spec", lambda _: True)
    with pytest.raises(UserError, match="search doesn't run on Ray"):
        sweep(
            swept[0], vary=VARY, search=("finetune.lr=1e-4..1e-2",), trials=2, ray="auto",
            out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


COURIER = """
import json, sys
job = json.loads(sys.stdin.readline())
print("chatter", file=sys.stderr)
for event in job["calls"]["told"]:
    print(json.dumps(event), flush=True)
    if event["event"] == "joined":
        assert sys.stdin.readline() == "go\\n"
"""
JOINED: dict[str, Any] = {"event": "joined", "nodes": ["n"]}
DONE = {"event": "answer", "name": "a", "node": "n", "error": None}


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ([DONE, {"event": "end"}], None),
        ([{"event": "gone", "node": "n"}, DONE], "is lost"),
        ([DONE, {"event": "failed", "error": cluster.packed(UserError("too small"))}], "too small"),
    ],
)
def test_the_courier_is_heard_until_it_ends_or_is_lost(
    told: list[Any], match: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    script = tmp_path / "courier.py"
    script.write_text(COURIER)
    monkeypatch.setattr(calling.courier, "__file__", str(script))
    prepared: list[int] = []
    found = calling.answered(
        "auto", "no:where", {"told": [JOINED, *told]},  # type: ignore[dict-item]
        needs=calling.Needs(1), hello=("no:where", {}), seen=[],
        before=lambda: prepared.append(1), log=tmp_path / "ray.log",
    )  # fmt: skip
    assert next(found) == Answer("a", "n", None) and prepared == [1]
    if match is None:
        assert list(found) == []
    else:
        with pytest.raises(UserError, match=match):
            next(found)
    assert "chatter" in (tmp_path / "ray.log").read_text()
    assert "chatter" not in capfd.readouterr().err


# -- a real cluster -------------------------------------------------------------------------------


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of a head without processors and two machines of one, on 127.0.0.1 alone."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written to the home folder
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"include_dashboard": False, "object_store_memory": 2**27}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    yield made, [made.add_node(num_cpus=1, object_store_memory=2**27) for _ in range(2)]
    made.shutdown()


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start commands, of which none outlives the test."""
    with ExitStack() as stack:

        def begin(command: list[str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


def reached(out: Path) -> int:
    """Return how often a candidate has come to its finetuning."""
    logs = [log.parent for log in (out / "candidates").glob("*/log.jsonl")]
    return sum(events(log, e).count("finetuned") for log in logs for e in ("start", "cached"))


def until(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    """Wait for the process to get somewhere; it may not end before."""
    while not is_so():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray's own launching
def test_a_cluster_makes_the_same_runs_though_the_sweep_and_a_machine_are_killed(
    loopback: Any, start: Callable[[list[str]], subprocess.Popen[str]], tmp_path: Path
) -> None:
    made, (_, second) = loopback
    path = write_recipe(tmp_path / "tiny.yaml", spec())
    # enough epochs that a kill finds a training under way
    vary = ("target.hidden_size=0.75,0.5", "finetune.epochs=100")
    serial = sweep(path, vary=vary, out=tmp_path / "serial")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "slimfuse", "sweep", str(path), "--out", str(out)]
    command += [word for option in vary for word in ("--set", option)]
    command += ["--ray", made.address]
    first = start(command)
    until(first, lambda: reached(out) > 0)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = reached(out)
    again = start(command)
    until(again, lambda: reached(out) >= before + 2)  # one on each machine
    made.remove_node(second, allow_graceful=False)
    shown, told = again.communicate()
    assert again.returncode == 0, told
    assert "a machine is gone: 127.0.0.1" in told and "raylet" not in shown + told
    assert (out / "sweep.html").is_file() and (out / "ray.log").is_file()
    for name, run in serial.runs.items():
        own = out / "candidates" / run.folder.name
        assert folder_bytes(own / "model") == folder_bytes(run.model), name
