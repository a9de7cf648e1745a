"""The process that joins a Ray cluster, hands out calls and tells what comes of them.

Run as a script, it imports nothing of slimfuse. Its standard input is one line of JSON, another
line when the calls may begin, and stays open for as long as its parent lives; events go to its
standard output, a line of JSON each. What Ray prints goes to a file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import Any

RETRIES = 3  # of a call whose worker died, Ray's own default
PATIENCE = 180.0  # seconds for the first word of every machine: importing torch takes a while
ABANDONED = 120.0  # seconds without a machine that could take a call
POLL = 5.0


def call(
    entry: str, given: dict[str, Any], seen: list[tuple[str, str]]
) -> tuple[str, dict[str, Any] | None]:
    """Call a function on the machine that runs this, and return the machine's name and its answer.

    seen: files and the text that each has to hold here. Ray sends this function as it stands:
    there may be no slimfuse where it arrives.
    """
    import importlib
    import pathlib
    import socket

    here = socket.gethostname()

    def refused(what: str, **more: Any) -> tuple[str, dict[str, Any]]:
        parts = dict.fromkeys(("where", "got", "allowed", "hint")) | more
        return here, {"kind": "UserError", "code": 2, "what": what, **parts}

    for path, text in seen:
        try:
            same = pathlib.Path(path).read_text(encoding="utf-8") == text
        except OSError:
            same = False
        if not same:
            return refused(
                "a machine of the Ray cluster doesn't see the same files",
                where=here,
                got=path,
                hint="put the recipe, the data, saved parents and --out on a file system that all "
                "machines share, under the same path",
            )
    try:
        from slimfuse.cluster import answer

        importlib.import_module(entry.partition(":")[0])
    except ImportError as error:
        return refused(
            "a machine of the Ray cluster can't import slimfuse",
            where=here,
            got=str(error),
            hint="install the same versions on every machine, in the Python that runs Ray there",
        )
    return here, answer(entry, given)


class Failed(Exception):
    """What ends the session: an error as JSON values."""

    def __init__(self, what: str, **more: Any) -> None:
        super().__init__(what)
        parts: dict[str, Any] = dict.fromkeys(("where", "got", "allowed", "hint"))
        self.values = {"kind": "UserError", "code": 2, "what": what, **parts, **more}


def join(address: str, log: str) -> None:
    """Join a cluster, or start one of this machine's processors."""
    import ray

    host, _, port = address.rpartition(":")
    if port.isdecimal():  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise Failed(
                "no Ray cluster answers",
                where="--ray",
                got=f"{address} ({error.strerror or error})",
                hint="start one: ray start --head --port 6379",
            ) from error
    own: dict[str, Any] = {}
    if address == "local":  # strings are all that is carried: the store of objects may be small
        own = {"include_dashboard": False, "object_store_memory": 2**27}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
    except ConnectionError as error:
        raise Failed(
            "no Ray cluster can be joined",
            where="--ray",
            got=address,
            allowed="HOST:PORT of a cluster, auto for the one of this machine, or local",
            hint=f"start one: ray start --head --port 6379 (Ray's words are in {log})",
        ) from error
    except Exception as error:  # another version, no token, too slow a start: each its own class
        raise Failed(
            f"a Ray cluster can't be {'started' if own else 'joined'}",
            where="--ray",
            got=f"{address} ({' '.join(str(error).split())[:300]})",
            hint=f"Ray's words are in {log}",
        ) from error


class Session:
    """A joined cluster and the calls on it; needs: what each call takes of a machine."""

    def __init__(self, job: dict[str, Any], tell: Any) -> None:
        import ray

        self.ray, self.job, self.tell = ray, job, tell
        self.needs: dict[str, float] = job["needs"]
        self.seen = [(path, text) for path, text in job["seen"]]
        self.remote = ray.remote(call)

    def machines(self) -> dict[str, dict[str, Any]]:
        """Return the living nodes that could take a call, by their ids."""
        return {
            node["NodeID"]: node
            for node in self.ray.nodes()
            if node["Alive"]
            and all(node["Resources"].get(k, 0.0) >= v for k, v in self.needs.items())
        }

    def greet(self) -> None:
        """Ask every machine whether it has the files and the software; raises Failed for all."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = self.machines()
        wanted = " and ".join(f"{v:g} {k}" for k, v in self.needs.items())
        if not nodes:
            have = [{k: n["Resources"].get(k, 0.0) for k in self.needs} for n in self.ray.nodes()]
            told = "; ".join(", ".join(f"{v:g} {k}" for k, v in one.items()) for one in have)
            raise Failed(
                "no machine of the Ray cluster is large enough for a candidate", where="--ray",
                got=told or "no machine", allowed=wanted, hint="set runtime.threads in the recipe",
            )  # fmt: skip
        entry, given = self.job["hello"]
        asked = {}
        for number in nodes:
            there = NodeAffinitySchedulingStrategy(number, soft=False)
            remote = self.remote.options(num_cpus=0, scheduling_strategy=there)
            asked[remote.remote(entry, given, self.seen)] = number
        done, silent = self.ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE)
        wrong: list[dict[str, Any]] = []
        for ref in done:
            _, error = self.ray.get(ref)
            wrong += [] if error is None else [error]
        if silent:
            names = [nodes[asked[ref]]["NodeManagerAddress"] for ref in silent]
            raise Failed(
                "machines of the Ray cluster don't answer", where="--ray", got=", ".join(names),
                hint=f"Ray's words are in {self.job['log']}",
            )  # fmt: skip
        if wrong:
            first, places = wrong[0], dict.fromkeys(str(error["where"]) for error in wrong)
            raise Failed(**first | {"where": ", ".join(places)})
        self.tell("joined", nodes=[_told(node, self.needs) for node in nodes.values()])

    def run(self) -> None:
        """Hand all calls out, and tell each one's answer as it comes."""
        cpus, gpus = self.needs["CPU"], self.needs.get("GPU", 0.0)
        waiting = {}
        for name, given in self.job["calls"].items():
            options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES, "name": name}
            ref = self.remote.options(**options).remote(self.job["entry"], given, self.seen)
            waiting[ref] = name
        alive, since = self.machines(), time.monotonic()
        while waiting:
            done, _ = self.ray.wait(list(waiting), timeout=POLL)
            for ref in done:
                self._tell_answer(waiting.pop(ref), ref)
            now = self.machines()
            for number in alive.keys() - now.keys():
                self.tell("gone", node=alive[number]["NodeManagerAddress"])
            if now:
                since = time.monotonic()
            elif waiting and time.monotonic() - since > ABANDONED:
                raise Failed(
                    "the Ray cluster has no machine left", where="--ray",
                    got=f"{len(waiting)} candidates wait",
                    hint="run the same command again: what is finished is kept",
                )  # fmt: skip
            alive = now

    def _tell_answer(self, name: str, ref: Any) -> None:
        try:
            node, error = self.ray.get(ref)
        except self.ray.exceptions.OutOfMemoryError:
            node, error = "", _died(name, "Ray ended it: the machine's memory was full", self.job)
        except self.ray.exceptions.RayError as fault:
            said = (str(fault).splitlines() or [""])[0][:200]
            node, error = "", _died(name, f"{type(fault).__name__}: {said}", self.job)
        self.tell("answer", name=name, node=node, error=error)


def _died(name: str, got: str, job: dict[str, Any]) -> dict[str, Any]:
    return Failed(
        f"the worker that made a candidate died, {RETRIES + 1} times", where=name, got=got,
        hint=f"run the same command again; Ray's words are in {job['log']}",
    ).values  # fmt: skip


def _told(node: dict[str, Any], needs: dict[str, float]) -> str:
    has = ", ".join(f"{node['Resources'].get(k, 0.0):g} {k}" for k in needs)
    return f"{node['NodeManagerAddress']} ({has})"


def _follow(lines: Any) -> None:
    """End this process with its parent, whose end closes the pipe: Ray then ends the calls."""
    lines.read()
    os._exit(1)


def main() -> int:
    """Read the job from standard input and run it; 0 where every call has an answer."""
    job = json.loads(sys.stdin.readline())
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def tell(event: str, **more: Any) -> None:
        events.write(json.dumps({"event": event, **more}) + "\n")
        events.flush()

    try:
        join(job["address"], job["log"])
        session = Session(job, tell)
        session.greet()
        if not sys.stdin.readline():  # the parent is gone
            return 1
        threading.Thread(target=_follow, args=(sys.stdin,), daemon=True).start()
        session.run()
        with contextlib.suppress(Exception):
            session.ray.shutdown()
        tell("end")
    except Failed as error:
        tell("failed", error=error.values)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
