"""The processes of one run, as a launcher started them: one writes and speaks, all end together.

All of them tell the same story (`pipeline.run`). What only one has to do is `told`: the main
process does it, the others wait and hear what came of it, or that it failed. The waiting goes over
a gloo group of its own, which has no short timeout: an export takes minutes. What is summed goes
through accelerate, see `saliency.parallel`. The run folder has to be one for all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slimfuse.errors import SlimfuseError, UserError
from slimfuse.progress import console

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slimfuse.saliency.parallel import Processes

T = TypeVar("T")
PATIENCE = timedelta(days=2)
"""How long the others wait for what the main process does alone."""
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
"""Where launchers say how many processes there are and which this one is, as accelerate reads."""
ENDED, SPOKEN = "slimfuse/ended", "slimfuse/spoken"
HEARING = timedelta(seconds=10)
AGAIN = "run the same command again: it goes on from the last checkpoint"


class Ended(SlimfuseError):
    """Another process has ended the run, and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__("another process has ended the run, and has said why")
        self.exit_code = code


class Lost(SlimfuseError):
    """Another process of the run is gone."""


class Team:
    """The processes of a run; without a launcher there is one, which does everything."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.index = 0 if accelerator is None else int(accelerator.process_index)
        self.size = 1 if accelerator is None else int(accelerator.num_processes)
        self.main = self.index == 0
        self.alone = self.size == 1  # or for as long as this one works for all
        self._threads: tuple[int, int] | None = None
        self._group: Any = None
        if self.size > 1:
            import torch

            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def ranks(self) -> Processes:
        """What shares batches and sums statistics."""
        from slimfuse.saliency.parallel import Processes

        return Processes(self.accelerator)

    def told(self, work: Callable[[], T]) -> T:
        """Return what `work` gives in the main process; the others wait for it.

        work: returns what can be pickled. An error there is raised there, and `Ended` elsewhere.
        """
        if self.alone:
            return work()
        if not self.main:
            code, value = self._cast(None)
            if code is not None:
                raise Ended(code)
            return value  # type: ignore[no-any-return]
        try:
            with self._working_alone():
                value = work()
        except BaseException as error:
            with contextlib.suppress(Lost):
                self._cast((int(getattr(error, "exit_code", 1)), None))
            raise
        self._cast((None, value))
        return value

    def wait(self) -> None:
        """Return when every process has come here."""
        if not self.alone:
            import torch

            with self.guard():
                torch.distributed.barrier(group=self._group)

    def check_alike(self, text: str, what: str) -> None:
        """Raise UserError where a text isn't the main process's, line by line."""
        own, main = text.splitlines(), self.told(lambda: text).splitlines()
        if own != main:
            odd = [line.strip() for line in own if line not in main]
            raise UserError(
                f"the processes don't have the same {what}",
                where=f"process {self.index} of {self.size}",
                got="; ".join(odd[:3]) or "fewer lines",
                allowed="; ".join([line.strip() for line in main if line not in own][:3]) or None,
                hint="give every node the same files and the same versions",
            )

    def take(self, threads: int) -> None:
        """Share a machine's threads among its processes; who works for all has them whole."""
        import torch

        own = max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._threads = None if self.alone else (threads, own)
        torch.set_num_threads(threads if self.alone else own)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn what a broken connection raises into Lost."""
        try:
            yield
        except RuntimeError as error:
            import torch

            known = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
            if self.size == 1 or not known:
                raise
            raise Lost("another process of this run has ended", hint=AGAIN) from error

    @contextmanager
    def _working_alone(self) -> Iterator[None]:
        import torch

        self.alone = True
        if self._threads is not None:
            torch.set_num_threads(self._threads[0])
        try:
            yield
        finally:
            self.alone = False
            if self._threads is not None:
                torch.set_num_threads(self._threads[1])

    def _cast(self, value: Any) -> Any:
        """Return what the main process gives."""
        import torch

        box = [value]
        with self.guard():
            torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


ALONE = Team()
_team: list[Team] = []


def launched() -> tuple[int, int]:
    """Return which process this is, and of how many, as the launcher says."""
    index, size = (
        next((int(os.environ[name]) for name in names if name in os.environ), default)
        for names, default in ((RANKS, 0), (SIZES, 1))
    )
    return (index, size) if size > 1 else (0, 1)


def assemble() -> Team:
    """Return the processes that a launcher started; they meet at the first call."""
    if launched()[1] == 1:
        return ALONE
    if not _team:
        import torch
        from accelerate import Accelerator

        # accelerate's own precision is fixed for the life of the process: the loop has its own
        cpu = not torch.cuda.is_available()
        _team.append(Team(Accelerator(mixed_precision="no", cpu=cpu)))
        console.quiet = not _team[0].main
    return _team[0]


def alone(what: str) -> None:
    """Raise UserError in a launch of several processes, which `what` makes nothing of."""
    if launched()[1] > 1:
        raise UserError(
            f"{what} runs in one process",
            got=f"a launch of {launched()[1]}",
            allowed="compress and sparsify run in several",
            hint=f"start it without a launcher: slimfuse {what} …",
        )


def take_leave(code: int, said: str | None) -> tuple[int, str]:
    """Return the exit code of this process, and what it has to say before it calls `spoken`.

    said: what it would say of its end, "" where all end in order, None where another has spoken.
    Of processes that end by an error the first speaks, since it knows best, and gives its code to
    all; before they have met, the same has gone wrong in all of them, and the main one speaks.
    """
    index, size = launched()
    if size == 1:
        return code, said or ""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends all when the first is gone
    if not _team:
        return code, said or "" if index == 0 else ""
    with contextlib.suppress(RuntimeError, Lost):  # the store may be gone with its process
        if said == "":
            _team[0].wait()
            return code, ""
        store = _store()
        if said is not None:
            first = store.compare_set(ENDED, "", f"{index} {code}").decode()
            if first == f"{index} {code}":
                return code, said
            code = int(first.split()[1])
        store.wait([SPOKEN], HEARING)  # who has nothing to say leaves last
        return code, ""
    return code, said or ""


def spoken() -> None:
    """Let the others go, who wait for the message of the one that ends the run."""
    if _team:
        with contextlib.suppress(RuntimeError):
            _store().set(SPOKEN, "")


def _store() -> Any:
    """Return the launcher's store, which outlives what goes wrong between the processes."""
    import torch

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kind: Any = torch.distributed.TCPStore  # type: ignore[attr-defined]
    return kind(host, port, is_master=False, timeout=HEARING)


@contextmanager
def main_speaks() -> Iterator[None]:
    """Silence standard output and error of all processes but the main one."""
    if launched()[0] == 0:
        yield
        return
    with (
        Path(os.devnull).open("w") as void,
        contextlib.redirect_stdout(void),
        contextlib.redirect_stderr(void),
    ):
        yield


def ended_by_sigterm() -> str:
    """Return what to say of an end by SIGTERM."""
    if launched()[1] == 1:
        return "ended by SIGTERM: run the same command again to go on from here"
    return f"ended by SIGTERM, as a launcher ends all processes when one of them has died: {AGAIN}"
