"""Latencies as measured, and the questions one may ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slimfuse_export.errors import ExportError

NOISY_SPREAD = 1.5  # p90 over p50 on a quiet machine is below 1.2


class Key(NamedTuple):
    """Which model was timed how: its name, intra-op threads, and rows a call."""

    name: str
    threads: int
    batch: int


def conditions(threads: int, batch: int) -> str:
    """Return "1 thread, batch 8" and the like."""
    return f"{threads} thread{'s' * (threads > 1)}, batch {batch}"


@dataclass(frozen=True)
class Latency:
    """One model's time for one call, in milliseconds, over `n` calls with `batch` rows each.

    noisy: p90 is more than 1.5 times p50, so something else used the machine; measure again.
    """

    name: str
    threads: int
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    n: int
    noisy: bool

    @classmethod
    def of(cls, key: Key, samples: NDArray[np.float64]) -> Latency:
        """Sum up the samples (calls,) in milliseconds."""
        p50, p90, p99 = (float(p) for p in np.percentile(samples, (50, 90, 99)))
        noisy = p90 > NOISY_SPREAD * p50
        return cls(*key, p50, p90, p99, float(samples.mean()), len(samples), noisy)


@dataclass(frozen=True)
class Ratio:
    """p50 of `other` over p50 of `base`, below 1 where `other` is faster.

    low, high: 95 % interval. n: rounds. noisy: either model's samples are.
    """

    base: str
    other: str
    threads: int
    batch: int
    value: float
    low: float
    high: float
    n: int
    noisy: bool

    @property
    def speedup(self) -> float:
        """How many times faster `other` is than `base`."""
        return 1 / self.value


@dataclass(frozen=True)
class BenchResult:
    """What one `bench` measured, under which conditions.

    samples: milliseconds (rounds,) by key; index i of two models is the same round where threads
    and batch agree. environment: see `environment`.
    """

    latencies: tuple[Latency, ...]
    samples: Mapping[Key, NDArray[np.float64]]
    environment: Mapping[str, str | int | float | None]

    def ratio(
        self, base: str, other: str, *, threads: int = 1, batch: int = 1, seed: int = 0
    ) -> Ratio:
        """Return how `other` compares with `base` at the given threads and batch.

        Raises: ExportError where one of the two was not measured so.
        """
        keys = [Key(name, threads, batch) for name in (base, other)]
        if gaps := [key for key in keys if key not in self.samples]:
            raise ExportError(
                "not measured",
                got=[tuple(key) for key in gaps],
                allowed=[*map(tuple, self.samples)],
            )
        pair = [self.samples[key] for key in keys]
        value, low, high = bootstrap_ratio(*pair, seed=seed)
        noisy = any(Latency.of(*item).noisy for item in zip(keys, pair, strict=True))
        return Ratio(base, other, threads, batch, value, low, high, len(pair[0]), noisy)

    def ratios(self, base: str, *, seed: int = 0) -> list[Ratio]:
        """Return every other model's ratio to `base`, at each threads and batch."""
        return [
            self.ratio(base, name, threads=threads, batch=batch, seed=seed)
            for name, threads, batch in self.samples
            if name != base
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the environment and latencies, without the samples, fit for JSON."""
        return {
            "environment": dict(self.environment),
            "latencies": [asdict(latency) for latency in self.latencies],
        }


def bootstrap_ratio(
    base: NDArray[np.float64],
    other: NDArray[np.float64],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return median(other) / median(base) and the bounds of its percentile interval.

    base, other: samples (rounds,) of the same rounds. Rounds are drawn in pairs, so what slowed
    both cancels, and in circular blocks of n^(1/3), because slow rounds come in bursts.
    Raises: ExportError for unequal or fewer than 2 rounds.
    Source: Politis and Romano 1992, circular block bootstrap.
    """
    n = len(base)
    if len(other) != n or n < 2:
        raise ExportError("a ratio needs paired rounds", got=(n, len(other)), allowed="2 or more")
    rng = np.random.default_rng(seed)
    block = max(1, round(n ** (1 / 3)))
    offsets = np.arange(block)
    ratios = np.empty(resamples)
    for index in range(resamples):
        starts = rng.integers(n, size=-(-n // block))
        rounds = ((starts[:, None] + offsets) % n).ravel()[:n]
        ratios[index] = np.median(other[rounds]) / np.median(base[rounds])
    low, high = np.quantile(ratios, ((1 - level) / 2, (1 + level) / 2))
    return float(np.median(other) / np.median(base)), float(low), float(high)
