"""A process in which slimfuse can't be imported, and which opens folders one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from slimfuse import compat

MARK = "RESULT "  # before an answer: libraries may print, too
LOOP = """
import gc, json, logging, sys, traceback
sys.modules["slimfuse"] = None          # importing it anywhere below is an error
sys.modules["slimfuse_export"] = None
logging.disable(logging.WARNING)
for line in sys.stdin:
    asked, told = json.loads(line), {}
    given = {"folder": asked["folder"], "threads": asked["threads"], "tell": told.update}
    try:
        exec(compile(asked["script"], "script", "exec"), given)
    except Exception as error:
        told = {"error": traceback.format_exception_only(error)[-1].strip()}
    given.clear()
    gc.collect()
    print("RESULT " + json.dumps(told), flush=True)
"""
PROGRAM = Path(compat.__file__).read_text(encoding="utf-8") + LOOP


class CleanProcess:
    """Runs scripts on folders in one interpreter, each in a namespace of its own."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            # -P: nothing in the current folder may stand in for an installed package
            [sys.executable, "-P", "-c", PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, encoding="utf-8", env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def ask(self, script: str, folder: Path, threads: int) -> dict[str, Any]:
        """Return what a script tells of a folder; `error` alone where it or the process failed."""
        asked = {"script": script, "folder": str(folder.resolve()), "threads": threads}
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        self._errors.seek(0)  # for the process, too, which shares the place
        self._errors.truncate()
        try:
            print(json.dumps(asked), file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith(MARK):
                    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                    return found
        except BrokenPipeError:
            pass  # it ended before; what it said of that is told below
        except BaseException:
            self.close()  # an answer that nobody waits for would be taken for the next one's
            raise
        self._process.wait()  # its output has ended
        words = self._last_words()
        self.close()
        return {"error": words}

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it never read
                pipe.close()
        self._process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"the process ended with {self._process.returncode}"


_shared: ContextVar[list[CleanProcess] | None] = ContextVar("clean process", default=None)


@contextmanager
def one_process() -> Iterator[None]:
    """Let all that is verified within share a process: to start one takes seconds."""
    kept: list[CleanProcess] = []
    before = _shared.set(kept)
    try:
        yield
    finally:
        _shared.reset(before)
        for process in kept:
            process.close()


@contextmanager
def clean_process() -> Iterator[CleanProcess]:
    """Yield the shared process, or one for this time."""
    kept = _shared.get()
    if kept is None:
        process = CleanProcess()
        try:
            yield process
        finally:
            process.close()
        return
    if not kept or not kept[-1].alive:
        kept[:] = [CleanProcess()]
    yield kept[-1]
