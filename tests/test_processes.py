"""One run in several real processes: who writes, who waits, and how all of them end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from ranks import RANKS, start
from safetensors.torch import load_file
from tiny_comparison import SHALLOW_ALONE
from tiny_run import die, events, recipe, write_recipe
from torch.multiprocessing import ProcessExitedException

from slimfuse import processes
from slimfuse.errors import StorageError, UserError
from slimfuse.finetune import loop
from slimfuse.pipeline import Run, compress, deployment
from slimfuse.pipeline.comparison import compare
from slimfuse.processes import Ended, Lost, assemble, launched, spoken, take_leave
from slimfuse.store import Store

ROOT = Path(__file__).parents[1]
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))


class Cut(UserError):
    """What ends a run before its slow half, the export."""


def cut(*_: Any, **__: Any) -> None:
    raise Cut("no further", hint="go on")


def begun(path: Path, root: Path) -> None:
    """Run a recipe up to its export."""
    deployment.export_onnx, before = cut, deployment.export_onnx
    try:
        compress(path, out=root)
    finally:
        deployment.export_onnx = before


def stages(root: Path) -> dict[str, Path]:
    """Return the finished stages by name."""
    done = [f for f in (root / "stages").iterdir() if f.suffix != ".partial"]
    return {f.name.rpartition("-")[0]: f for f in done}


# -- what the processes tell each other ---------------------------------------------------


def talk(accelerator: Accelerator, root: Path) -> None:
    team, rank = assemble(), accelerator.process_index
    assert (team.index, team.size, launched()) == (rank, RANKS, (rank, RANKS))
    seen: list[int] = []
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    team.take(3)  # one each, and three for who works alone
    assert team.told(lambda: (seen.append(rank), torch.get_num_threads())) == (None, 3)
    assert torch.get_num_threads() == 1 and seen == [0] * (rank == 0)
    assert team.told(lambda: team.told(lambda: 7)) == 7  # who works alone has nobody to ask

    def fail() -> None:
        raise StorageError("no room")

    with pytest.raises(StorageError if team.main else Ended) as found:
        team.told(fail)
    assert found.value.exit_code == 2
    team.check_alike("a: 1\nb: 2", "run")
    if team.main:
        team.check_alike("a: 1", "run")
    else:
        with pytest.raises(UserError, match=r"(?s)process 1 of 2.*got: +a: 2.*allowed: +a: 1"):
            team.check_alike("a: 2", "run")
    with pytest.raises(UserError, match="compare runs in one process"):
        compare(root / "none.yaml")

    store = Store(root / "run", team=team)
    made: list[str] = []

    def build(folder: Path) -> None:
        made.append(folder.name)
        if team.main:
            (folder / "file").write_text("x")

    with store.lock():
        one = store.stage("together", {"a": 1}, build, together=True)
        other = store.stage("alone", {"a": 1}, build)
        again = Store(root / "run", team=team).stage("alone", {"a": 1}, build)
    assert one.files == other.files == again.files and one.files
    assert len(made) == (2 if team.main else 1)
    team.wait()
    (root / f"done.{rank}").touch()


def test_the_main_process_works_and_the_others_hear_of_it(tmp_path: Path) -> None:
    start(talk, tmp_path)
    assert all((tmp_path / f"done.{rank}").exists() for rank in range(RANKS))
    assert sorted(events(tmp_path / "run", "done")) == ["alone", "together"]
    assert events(tmp_path / "run", "cached") == ["alone"]


def leave(accelerator: Accelerator, root: Path) -> None:
    assemble()
    rank = accelerator.process_index
    if rank == 0:
        time.sleep(1)  # the other one is the first
    code, said = take_leave(2 + rank, f"process {rank} failed")
    (root / f"said.{rank}").write_text(f"{code} {said}")
    if said:
        spoken()


def test_one_process_says_what_went_wrong_and_all_have_its_code(tmp_path: Path) -> None:
    start(leave, tmp_path)
    assert [(tmp_path / f"said.{rank}").read_text() for rank in range(RANKS)] == [
        "3 ", "3 process 1 failed",
    ]  # fmt: skip


def test_alone_nothing_is_asked_of_others() -> None:
    team = assemble()
    assert team.alone and team.main and launched() == (0, 1)
    assert take_leave(2, "bad") == (2, "bad") and take_leave(0, "") == (0, "")
    with pytest.raises(RuntimeError, match="a word about gloo"), team.guard():
        raise RuntimeError("a word about gloo")  # nobody to be lost


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"RANK": "1", "WORLD_SIZE": "3"}, (1, 3)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, (2, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"PMI_RANK": "5"}, (0, 1)),  # no launch, whatever it is
    ],
)
def test_launchers_are_read_as_accelerate_reads_them(
    environment: dict[str, str], found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*processes.RANKS, *processes.SIZES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == found


# -- runs ---------------------------------------------------------------------------------

SPARSE = {"sparsity": 0.5, "scorer": "woodfisher", "samples": 7, "steps": 2, "epochs": 1}


def run(accelerator: Accelerator, path: Path, root: Path) -> None:
    with pytest.raises(Cut if accelerator.is_main_process else Ended) as found:
        begun(path, root)
    assert found.value.exit_code == 2


def test_two_processes_make_the_stages_of_one(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "parents": SHALLOW_ALONE, "sparsify": SPARSE, "finetune": {"epochs": 1}, "baselines": [],
    }  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", recipe(**changes))
    start(run, path, tmp_path / "two")
    with pytest.raises(Cut):
        begun(path, tmp_path / "one")
    assert events(tmp_path / "two", "start") == events(tmp_path / "one", "start")
    one, two = stages(tmp_path / "one"), stages(tmp_path / "two")
    assert one.keys() == two.keys() and {"parent-a", "fused", "finetuned", "pruned"} <= one.keys()
    # AdamW's steps are ± rate where a gradient is rounding: the biases of keys, which don't count
    first = "parent-a"
    for name, value in load_file(one[first] / "model.safetensors").items():
        if not name.endswith("key.bias"):
            found = load_file(two[first] / "model.safetensors")[name]
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)
    zeros = [load_file(made["sparse"] / "masks.safetensors") for made in (one, two)]
    assert zeros[0].keys() == zeros[1].keys()


def lose(accelerator: Accelerator, path: Path, root: Path) -> None:
    """Train until process 1 dies between two steps behind a checkpoint."""
    loop.CHECKPOINT_SECONDS = 0.0
    if accelerator.is_main_process:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torch, which ends the others
        with pytest.raises(Lost, match="goes on from the last checkpoint"):
            begun(path, root)
        (root / "lost").touch()
        os._exit(0)
    steps = iter(range(4))
    patched = loop.batch_indices

    def counted(*given: Any) -> Any:
        return patched(*given) if next(steps, None) is not None else die()

    loop.batch_indices = counted  # type: ignore[assignment]
    begun(path, root)


def test_a_run_that_lost_a_process_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = recipe(parents=SHALLOW_ALONE, baselines=[])
    path, root = write_recipe(tmp_path / "r.yaml", spec), tmp_path / "run"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        start(lose, path, root)
    for _ in range(100):
        if (root / "lost").exists():
            break
        time.sleep(0.1)
    assert (root / "lost").exists()
    (checkpoint,) = (root / "stages").glob("parent-a-*.partial/checkpoint.safetensors")
    assert len(load_file(checkpoint)["history"]) == 3
    used: list[Path] = []
    restore = loop.restore
    monkeypatch.setattr(loop, "restore", lambda p, *a: (used.append(p), restore(p, *a))[1])
    with pytest.raises(Cut):
        begun(path, root)  # by one process
    assert used == [checkpoint] and "finetuned" in stages(root)


# -- the command line ---------------------------------------------------------------------


def launch(*arguments: str) -> subprocess.Popen[str]:
    """Start the command line in two processes, as a user does."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    home = os.pathsep.join([str(ROOT), str(ROOT / "export")])
    return subprocess.Popen(
        [sys.executable, *LAUNCH, "-m", "slimfuse", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment | {"PYTHONPATH": home, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


# torchrun and two interpreters take half a minute; quick: what the processes agree on, above
@pytest.mark.slow
def test_an_error_is_said_once_and_both_have_its_code(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", recipe(family="vitt"))
    out, told = launch("compress", str(path), "--out", str(tmp_path / "run")).communicate()
    assert not out and told.count("error:") == 1 and "did you mean" in told
    assert told.count("exitcode  : 2") == told.count("exitcode  :")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_launched_run_ends_like_one_of_one_process(tmp_path: Path, finished: Run) -> None:
    path = write_recipe(tmp_path / "r.yaml")
    process = launch("compress", str(path), "--out", str(tmp_path / "run"))
    out, told = process.communicate()
    assert process.returncode == 0, told
    assert out.count("report.html") == 1 and told.count("finetuned:") == 1
    assert events(tmp_path / "run", "start") == events(finished.folder, "start")
    assert {f.name for f in (tmp_path / "run").iterdir()} == {
        f.name for f in finished.folder.iterdir()
    }


@pytest.mark.slow
def test_sigterm_ends_a_launched_run_with_a_checkpoint(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"finetune": {"epochs": 4000}}
    path, root = write_recipe(tmp_path / "r.yaml", recipe(**changes)), tmp_path / "run"
    process = launch("compress", str(path), "--out", str(root))
    until(lambda: (root / "log.jsonl").exists() and "finetuned" in events(root, "start"))
    time.sleep(3)
    process.terminate()
    _, told = process.communicate()
    assert told.count("ended by SIGTERM") == 1 and told.count("saved after") == 1
    assert list((root / "stages").glob("finetuned-*.partial/checkpoint.safetensors"))


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that a process does."""
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_the_shipped_configs(name: str) -> None:
    file = ROOT / "docs" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))  # raises for a key that it doesn't know
    assert config.num_processes > 1 and config.mixed_precision == "no" and not config.use_cpu
    known = launch_command_parser().parse_args(["--config_file", str(file), "x"])
    for key, value in (config.fsdp_config or {}).items():
        assert hasattr(known, key), f"accelerate launch has no --{key}"
        assert (key, value) != ("fsdp_cpu_ram_efficient_loading", True)
    assert (name == "fsdp2") == (config.distributed_type == "FSDP")
