"""Inputs of several requests in one call of the model."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from slimfuse_export.deployed.answers import Answer
from slimfuse_export.deployed.model import Row
from slimfuse_export.errors import ExportError

AnswerEach = Callable[[Sequence[Row]], list[Answer | ExportError]]


class QueueFull(Exception):
    """More inputs wait than the service takes."""


@dataclass
class _Waiting:
    row: Row
    since: float
    answer: asyncio.Future[Answer | ExportError]


class Batcher:
    """Collects rows for `wait` seconds at most and runs those of one key together.

    An input that comes while the model is idle waits `wait` for company; while it is busy, inputs
    gather without waiting longer than they must. The oldest input decides whose turn it is.
    answer_each: runs rows together, in a thread of its own. rows: of a batch. queue: rows that wait
    or run. observe: is told how many rows each batch had and how long it took, in seconds.
    """

    def __init__(
        self,
        answer_each: AnswerEach,
        *,
        rows: int,
        wait: float,
        queue: int,
        observe: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._answer_each, self._observe = answer_each, observe
        self._rows, self._wait, self._queue = rows, wait, queue
        self._pending: list[_Waiting] = []
        self._keys: Counter[tuple[int, ...]] = Counter()
        self._running = 0
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._pending) + self._running

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop when the batch that runs is done; requests were waited for before."""
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown()

    async def submit(self, rows: Sequence[Row]) -> list[Answer | ExportError]:
        """Return the answers of one request's rows; raises QueueFull for all of them or none."""
        if len(self) + len(rows) > self._queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        mine = [_Waiting(row, loop.time(), loop.create_future()) for row in rows]
        self._pending += mine
        self._keys.update(row.key for row in rows)
        self._changed.set()
        try:
            return [await one.answer for one in mine]
        finally:
            for one in mine:
                one.answer.cancel()  # no more than a word where it is answered
            if given_up := {id(one) for one in mine if one.answer.cancelled()}:
                self._leave([one for one in self._pending if id(one) not in given_up])

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            started, rows = loop.time(), [one.row for one in batch]
            self._running = len(rows)
            try:
                answers = await loop.run_in_executor(self._thread, self._answer_each, rows)
            except Exception as error:  # a fault of ours must reach the requests, not end the loop
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            finally:
                self._running = 0
            self._observe(len(rows), loop.time() - started)
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    async def _next(self) -> list[_Waiting]:
        """Return the oldest row with others of its key, when they are enough or it waited long."""
        loop = asyncio.get_running_loop()
        while True:
            left = None
            if self._pending:
                first = self._pending[0]
                key, left = first.row.key, first.since + self._wait - loop.time()
                if self._keys[key] >= self._rows or left <= 0:
                    break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        fitting = [one for one in self._pending if one.row.key == key]
        # the oldest first, then those nearest to it in length: little is filling
        fitting.sort(key=lambda one: abs(one.row.length - first.row.length))
        batch = sorted(fitting[: self._rows], key=lambda one: one.since)
        taken = {id(one) for one in batch}
        self._leave([one for one in self._pending if id(one) not in taken])
        return batch

    def _leave(self, pending: list[_Waiting]) -> None:
        self._pending = pending
        self._keys = Counter(one.row.key for one in pending)
        self._changed.set()
