"""Latency of several models, interleaved call by call so that drift hits all of them alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slimfuse_export.environment import environment
from slimfuse_export.errors import ExportError
from slimfuse_export.inputs import make_inputs as random_inputs
from slimfuse_export.latency import AGAIN, BenchResult, Key, Latency, conditions
from slimfuse_export.measuring.affinity import pinned
from slimfuse_export.measuring.footprint import Footprint, footprint
from slimfuse_export.sessions import open_session, run_session

Progress = Callable[[float, str], None]
InputMaker = Callable[[int], dict[str, NDArray[Any]]]

_TICK_SECONDS = 0.1


@dataclass(frozen=True)
class _Stop:
    """When a model has been timed enough."""

    min_seconds: float
    min_runs: int
    max_runs: int | None

    def done(self, runs: int, seconds: float) -> float:
        """Return the share of the work done, 1 or more when it's enough."""
        enough_time = seconds / self.min_seconds if self.min_seconds > 0 else 1.0
        capped = runs / self.max_runs if self.max_runs is not None else 0.0
        return min(runs / self.min_runs, max(enough_time, capped))


@dataclass
class _Runner:
    """A warm session with its inputs and the times (ns) it took so far."""

    session: ort.InferenceSession
    inputs: dict[str, NDArray[Any]]
    times: list[int] = field(default_factory=list)
    total: int = 0

    def call(self) -> None:
        """Run once and note the time."""
        start = time.perf_counter_ns()
        self.session.run(None, self.inputs)
        took = time.perf_counter_ns() - start
        self.times.append(took)
        self.total += took


def bench(
    models: Mapping[str, Path],
    *,
    make_inputs: InputMaker | None = None,
    dims: Mapping[str, int | Sequence[int]] | None = None,
    threads: Sequence[int] = (1,),
    batch: Sequence[int] = (1,),
    warmup: int = 10,
    min_seconds: float = 3.0,
    min_runs: int = 100,
    max_runs: int | None = None,
    control: bool = False,
    pin: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchResult:
    """Time one call of every model, for each number of threads, batch size and size of dims.

    All models stay open together; each round calls every one once, in an order shuffled with
    `seed`. Rounds go on until each model has `min_runs` calls and either `min_seconds` of its
    own time or `max_runs` calls.
    models: names and ONNX files. make_inputs: batch size → inputs for all models (each gets
    those it declares); random ones by default, with `dims` for dynamic dims other than the first,
    one size or several. warmup: untimed calls of each model. control: open the first model twice,
    so that what the machine adds by itself is known. pin: keep the calls on as many cores as there
    are threads. progress: called between calls with the share of all work done, 0 to 1, and a few
    words.
    Raises: ExportError for bad settings, missing or corrupt models and inputs that don't fit;
    CheckFailed where a model fails on them.
    """
    _require_legal(models, threads, batch, warmup, min_seconds, min_runs, max_runs)
    stop = _Stop(min_seconds, min_runs, max_runs)
    settings = list(product(threads, batch, _grid(dims)))
    first = next(iter(models))
    opened = dict(models) | ({first + AGAIN: models[first]} if control else {})
    samples: dict[Key, NDArray[np.float64]] = {}
    for index, (count, rows, sizes) in enumerate(settings):
        told = told_dims(sizes) if make_inputs is None and _axes(dims) else ""
        tell = _teller(progress, index, len(settings), conditions(count, rows, told))
        tell(0.0)
        with pinned(count) if pin else nullcontext():  # threads start where their session does
            runners = {
                name: _open(path, count, rows, make_inputs, sizes, warmup, seed)
                for name, path in opened.items()
            }
            _rounds(list(runners.values()), stop, random.Random(seed), tell)  # noqa: S311
        tell(1.0)
        for name, runner in runners.items():
            samples[Key(name, count, rows, told)] = np.array(runner.times, np.float64) / 1e6
        del runners  # the sessions' threads and memory go before the next are opened
    latencies = tuple(Latency.of(k, times) for k, times in samples.items() if k.name in models)
    return BenchResult(latencies, samples, environment(), first if control else None)


def footprints(
    models: Mapping[str, Path],
    *,
    dims: Mapping[str, int | Sequence[int]] | None = None,
    threads: Sequence[int] = (1,),
    batch: Sequence[int] = (1,),
    seed: int = 0,
) -> dict[tuple[str, int, str], Footprint]:
    """Return load time and memory of every model by (name, batch, dims), at the first threads.

    Each is measured in processes of its own, see `footprint`.
    Raises: as `bench`.
    """
    found = {}
    for (name, path), rows, sizes in product(models.items(), batch, _grid(dims)):
        inputs = random_inputs(open_session(path, threads=1), rows, dims=sizes, seed=seed)
        found[name, rows, told_dims(sizes)] = footprint(path, inputs, threads=threads[0])
    return found


def told_dims(sizes: Mapping[str, int]) -> str:
    """Return "a=1, b=2", as `Key.dims` has it."""
    return ", ".join(f"{name}={size}" for name, size in sorted(sizes.items()))


def _axes(dims: Mapping[str, int | Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    given = dict(dims or {})
    return {name: (s,) if isinstance(s, int) else tuple(s) for name, s in given.items()}


def _grid(dims: Mapping[str, int | Sequence[int]] | None) -> list[dict[str, int]]:
    """Return every combination of the dims' sizes, one empty one where there are none."""
    axes = _axes(dims)
    return [dict(zip(axes, sizes, strict=True)) for sizes in product(*axes.values())]


def _open(
    path: Path,
    threads: int,
    batch: int,
    make_inputs: InputMaker | None,
    dims: Mapping[str, int] | None,
    warmup: int,
    seed: int,
) -> _Runner:
    session = open_session(path, threads=threads)
    if make_inputs is None:
        inputs = random_inputs(session, batch, dims=dims, seed=seed)
    else:
        declared = {value.name for value in session.get_inputs()}
        inputs = {name: a for name, a in make_inputs(batch).items() if name in declared}
    for _ in range(max(1, warmup)):  # the first checked call explains what doesn't fit
        run_session(session, inputs)
    return _Runner(session, inputs)


def _rounds(
    runners: list[_Runner], stop: _Stop, rng: random.Random, tell: Callable[[float], None]
) -> None:
    order = list(runners)
    told = time.perf_counter()
    with _no_collection():
        while True:
            rng.shuffle(order)
            for runner in order:
                runner.call()
            done = min(stop.done(len(r.times), r.total / 1e9) for r in runners)
            if done >= 1:
                return
            if (now := time.perf_counter()) - told > _TICK_SECONDS:
                told = now
                tell(done)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the timed calls."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _teller(
    progress: Progress | None, index: int, total: int, label: str
) -> Callable[[float], None]:
    def tell(done: float) -> None:
        if progress is not None:
            progress((index + min(done, 1.0)) / total, label)

    return tell


def _require_legal(
    models: Mapping[str, Path],
    threads: Sequence[int],
    batch: Sequence[int],
    warmup: int,
    min_seconds: float,
    min_runs: int,
    max_runs: int | None,
) -> None:
    rules = (
        ("models", len(models), "1 or more", len(models) >= 1),
        ("threads", threads, "distinct numbers from 1", _distinct(threads)),
        ("batch", batch, "distinct numbers from 1", _distinct(batch)),
        ("warmup", warmup, "0 or more", warmup >= 0),
        ("min_seconds", min_seconds, "0 or more", min_seconds >= 0),
        ("min_runs", min_runs, "2 or more", min_runs >= 2),
        ("max_runs", max_runs, "min_runs or more", max_runs is None or max_runs >= min_runs),
    )
    if bad := [rule for rule in rules if not rule[3]]:
        raise ExportError(
            "the bench settings are not legal",
            got=", ".join(f"{name} {value}" for name, value, _, _ in bad),
            allowed=", ".join(f"{name}: {allowed}" for name, _, allowed, _ in bad),
        )


def _distinct(numbers: Sequence[int]) -> bool:
    return bool(numbers) and min(numbers) >= 1 and len(set(numbers)) == len(numbers)
