"""Rows of several requests in one call: which, when, and to whom the answers go."""

import asyncio
import threading

import pytest
from slimfuse_export import ExportError
from slimfuse_export.deployed import Options, Tokens
from slimfuse_export.deployed.model import Row
from slimfuse_export.serving import Batcher, Limits, QueueFull


def row(value, key=0):
    return Row(value, Options(), (key,))


class Model:
    """Answers with what it was asked; `gate` holds its calls up."""

    def __init__(self):
        self.calls = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, rows):
        self.gate.wait(10)
        self.calls.append([r.value for r in rows])
        return [{"value": r.value} for r in rows]


def run(scenario, *, rows=4, wait=0.05, queue=100):
    model = Model()

    async def inside():
        async with Batcher(model, rows=rows, wait=wait, queue=queue) as batcher:
            return await scenario(batcher, model)

    return asyncio.run(inside()), model.calls


def test_requests_share_calls_and_get_their_own_answers_back():
    async def scenario(batcher, model):
        requests = [[row(10 * i + j) for j in range(1 + i % 2)] for i in range(6)]
        return await asyncio.gather(*(batcher.submit(rows) for rows in requests))

    found, calls = run(scenario)
    assert [[a["value"] for a in answers] for answers in found] == [
        [0], [10, 11], [20], [30, 31], [40], [50, 51],
    ]  # fmt: skip
    assert [len(call) for call in calls] == [4, 4, 1]
    assert sum(calls, []) == [0, 10, 11, 20, 30, 31, 40, 50, 51]  # noqa: RUF017 - few


def test_rows_of_other_shapes_run_apart_the_oldest_first():
    async def scenario(batcher, model):
        return await batcher.submit([row("a", 1), row("b", 2), row("c", 1), row("d", 2)])

    found, calls = run(scenario, wait=0.01)
    assert [answer["value"] for answer in found] == ["a", "b", "c", "d"]
    assert calls == [["a", "c"], ["b", "d"]]


def test_texts_of_like_length_run_together():
    async def scenario(batcher, model):
        texts = [Tokens((1,) * n, (0,) * n) for n in (20, 32, 21, 31, 22, 30)]
        await batcher.submit([row(text) for text in texts])

    _, calls = run(scenario, rows=3)
    assert [[len(text) for text in call] for call in calls] == [[20, 21, 22], [32, 31, 30]]


def test_a_full_batch_does_not_wait():
    async def scenario(batcher, model):
        async with asyncio.timeout(30):
            await batcher.submit([row(i) for i in range(4)])

    _, calls = run(scenario, wait=3600)
    assert calls == [[0, 1, 2, 3]]


def test_a_lone_row_waits_no_longer_than_it_must():
    async def scenario(batcher, model):
        async with asyncio.timeout(30):
            return await batcher.submit([row(1)])

    found, _ = run(scenario, wait=0.01)
    assert found == [{"value": 1}]


def test_a_request_is_refused_whole_where_the_queue_is_full():
    async def scenario(batcher, model):
        model.gate.clear()
        first = asyncio.create_task(batcher.submit([row(i) for i in range(3)]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batcher.submit([row(7), row(8), row(9)])
        second = asyncio.create_task(batcher.submit([row(5), row(6)]))
        await asyncio.sleep(0)
        assert len(batcher) == 5
        model.gate.set()
        return await first, await second, len(batcher)

    (first, second, left), calls = run(scenario, queue=5)
    assert ([a["value"] for a in first], [a["value"] for a in second]) == ([0, 1, 2], [5, 6])
    assert left == 0
    assert 7 not in sum(calls, [])  # noqa: RUF017 - few


def test_rows_of_a_request_that_was_given_up_do_not_run():
    async def scenario(batcher, model):
        model.gate.clear()
        running = asyncio.create_task(batcher.submit([row(0)]))
        await asyncio.sleep(0.1)  # it runs, and is held up
        given_up = asyncio.create_task(batcher.submit([row(1)]))
        kept = asyncio.create_task(batcher.submit([row(2)]))
        await asyncio.sleep(0)
        given_up.cancel()
        model.gate.set()
        return await running, await kept

    _, calls = run(scenario, wait=0)
    assert calls == [[0], [2]]


def test_a_fault_reaches_its_requests_and_ends_nothing():
    async def scenario(batcher, model):
        batcher._answer_each, before = None, batcher._answer_each
        with pytest.raises(TypeError):
            await batcher.submit([row(0)])
        batcher._answer_each = before
        return await batcher.submit([row(1)])

    found, _ = run(scenario)
    assert found == [{"value": 1}]


def test_limits_are_checked_at_once():
    with pytest.raises(ExportError, match="limit is not legal") as caught:
        Limits(body_bytes=0, seconds=-1, wait_ms=0)
    assert "body_bytes 0, seconds -1" in str(caught.value)
    with pytest.raises(ExportError, match="shorter than one request"):
        Limits(queue=3)
