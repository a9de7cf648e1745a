"""Calls handed to the courier, and their answers as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimfuse.cluster import courier
from slimfuse.cluster.answers import unpacked
from slimfuse.errors import UserError
from slimfuse.progress import console

AUTO, LOCAL = "auto", "local"
AGAIN = "run the same command again: what is finished is kept"
PARTING = 20.0  # seconds
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's own switch, on any system, for a cluster that listens on 127.0.0.1 alone."""


@dataclass(frozen=True)
class Needs:
    """What each call takes of a machine."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Answer:
    """The answer of one call: the machine that gave it, and the error there, if any."""

    name: str
    node: str
    error: Exception | None


def check_address(address: str) -> None:
    """Raise UserError for what can't be the address of a cluster, and where Ray isn't installed."""
    host, _, port = address.rpartition(":")
    if address not in (AUTO, LOCAL) and not (host and "/" not in host and port.isdecimal()):
        raise UserError(
            "not the address of a Ray cluster",
            where="--ray",
            got=address or "nothing",
            allowed="HOST:PORT as ray start prints it, auto for the cluster of this machine, or "
            "local to use this machine's processors",
        )
    if find_spec("ray") is None:
        raise UserError(
            "several machines need Ray, which is not installed",
            where="--ray",
            hint="pip install 'slimfuse[ray]'",
        )


def answered(
    address: str,
    entry: str,
    calls: Mapping[str, Mapping[str, Any]],
    *,
    needs: Needs,
    hello: tuple[str, Mapping[str, Any]],
    seen: Sequence[tuple[Path, str]],
    before: Callable[[], None],
    log: Path,
) -> Generator[Answer, None, None]:
    """Call `entry` once for each of `calls` on a Ray cluster, and yield the answers as they come.

    address: see `check_address`. entry: `module:function`; calls: its keywords, JSON values, by the
    calls' names. A call whose worker or machine dies is made again, so it has to go on from what
    it left. hello: another function, called once on every machine before any work. seen: files and
    the text that each has to hold on every machine. before: work here that the calls need, done
    when all machines are known to fit. log: where Ray's own words go. Leaving the iterator ends the
    calls. Raises UserError where the cluster can't be joined, a machine doesn't fit, or the cluster
    is lost.
    """
    wants = {"CPU": float(needs.cpus)} | ({"GPU": float(needs.gpus)} if needs.gpus else {})
    job = {
        "address": address, "entry": entry, "calls": calls, "needs": wants, "hello": hello,
        "seen": [(str(path), text) for path, text in seen], "log": str(log),
    }  # fmt: skip
    with _courier(job, log) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            match event["event"]:
                case "joined":
                    console.print(f"  on Ray: {'; '.join(event['nodes'])}", markup=False)
                    before()
                    with suppress(BrokenPipeError):  # lost meanwhile: its output ends, too
                        process.stdin.write("go\n")
                        process.stdin.flush()
                case "gone":
                    told = f"  a machine is gone: {event['node']}; Ray starts its candidates again"
                    console.print(told, markup=False)
                case "answer":
                    error = None if event["error"] is None else unpacked(event["error"])
                    yield Answer(event["name"], event["node"], error)
                case "failed":
                    raise unpacked(event["error"])
                case "end":
                    return
    raise UserError(
        "the connection to the Ray cluster is lost",
        where="--ray",
        got=address,
        hint=f"{AGAIN}; Ray's words are in {log}",
    )


@contextmanager
def _courier(job: Mapping[str, Any], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the courier, and end it at the end."""
    own = LOOPBACK if job["address"] == LOCAL else {}
    with log.open("a") as words:
        process = subprocess.Popen(
            # -P: this folder's modules may not stand in for others
            [sys.executable, "-P", str(Path(courier.__file__))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True,
            encoding="utf-8", env=os.environ | QUIET | own,
            start_new_session=True,  # Ctrl-C is for the parent
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        yield process
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(PARTING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
