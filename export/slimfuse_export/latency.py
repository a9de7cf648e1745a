"""Latencies as measured, and the questions one may ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slimfuse_export.errors import ExportError
from slimfuse_export.measuring.affinity import cores_available

LEVEL = 0.95
NOISY_SPREAD = 1.5  # p90 over p50 on a quiet machine is below 1.2
CONTROL_WIDTH = 0.1  # of the interval of a model's ratio to itself
CONTROL_LEVEL = 0.99  # at 95 %, one of twenty quiet machines would be called noisy
CONTROL_BIAS = 0.02  # two sessions of one model lie differently in memory: measured 0.991–0.995
AGAIN = " (again)"
_MAX_ROUNDS = 10_000
_VALUES_AT_ONCE = 10**6  # of resampled times, 24 MB


class Key(NamedTuple):
    """Which model was timed how: its name, intra-op threads, rows a call, sizes of other dims."""

    name: str
    threads: int
    batch: int
    dims: str = ""


def conditions(threads: int, batch: int, dims: str = "") -> str:
    """Return "1 thread, batch 8" and the like."""
    more = f", {dims.replace('=', ' ')}" if dims else ""
    return f"{threads} thread{'s' * (threads > 1)}, batch {batch}{more}"


@dataclass(frozen=True)
class Latency:
    """One model's time for one call, in milliseconds, over `n` calls with `batch` rows each.

    noisy: p90 is more than 1.5 times p50, so something else used the machine; measure again.
    dims: sizes of the other dynamic dims, as "sequence_length=128". p50_low_ms, p50_high_ms: the
    95 % interval of the median, see `median_interval`; None of fewer than 6 calls.
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
    dims: str = ""
    p50_low_ms: float | None = None
    p50_high_ms: float | None = None

    @classmethod
    def of(cls, key: Key, samples: NDArray[np.float64]) -> Latency:
        """Sum up the samples (calls,) in milliseconds."""
        p50, p90, p99 = (float(p) for p in np.percentile(samples, (50, 90, 99)))
        noisy = p90 > NOISY_SPREAD * p50
        mean = float(samples.mean())
        low, high = median_interval(samples)
        return cls(
            key.name, key.threads, key.batch, p50, p90, p99, mean, len(samples), noisy, key.dims,
            low, high,
        )  # fmt: skip

    @property
    def throughput(self) -> float:
        """Rows a second, one call after the other."""
        return 1e3 * self.batch / self.mean_ms


@dataclass(frozen=True)
class Ratio:
    """p50 of `other` over p50 of `base`, below 1 where `other` is faster.

    low, high: 95 % interval. n: rounds. control: the 99 % interval of base's ratio to itself, from
    a second session in the same rounds; None where it was not measured. noise: why there is no
    verdict, empty where there is one.
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
    dims: str = ""
    control: tuple[float, float] | None = None
    noise: str = ""

    @property
    def speedup(self) -> float:
        """How many times faster `other` is than `base`."""
        return 1 / self.value

    @property
    def verdict(self) -> str:
        """Return "faster", "slower", "no sure difference", or that there is none and why.

        Sure is what the whole interval says, and what base does not do against itself.
        """
        if self.noisy:
            return f"no verdict: {self.noise}"
        low, high = self.control or (1.0, 1.0)
        if self.high < min(1.0, low):
            return "faster"
        return "slower" if self.low > max(1.0, high) else "no sure difference"


@dataclass(frozen=True)
class BenchResult:
    """What one `bench` measured, under which conditions.

    samples: milliseconds (rounds,) by key; index i of two models is the same round where threads
    and batch agree. environment: see `environment`. control: the model that was timed twice; its
    second session's samples lie under its name with " (again)".
    """

    latencies: tuple[Latency, ...]
    samples: Mapping[Key, NDArray[np.float64]]
    environment: Mapping[str, str | int | float | None]
    control: str | None = None
    cores: float = field(default_factory=cores_available)

    def ratio(
        self,
        base: str,
        other: str,
        *,
        threads: int = 1,
        batch: int = 1,
        dims: str = "",
        seed: int = 0,
    ) -> Ratio:
        """Return how `other` compares with `base` at the given threads, batch and dims.

        Raises: ExportError where one of the two was not measured so.
        """
        keys = [Key(name, threads, batch, dims) for name in (base, other)]
        if gaps := [key for key in keys if key not in self.samples]:
            raise ExportError(
                "not measured",
                got=[tuple(key) for key in gaps],
                allowed=[*map(tuple, self.samples)],
            )
        pair = [self.samples[key] for key in keys]
        value, low, high = bootstrap_ratio(*pair, seed=seed)
        control = self._control(threads, batch, dims, seed)
        spread = [Latency.of(*item) for item in zip(keys, pair, strict=True)]
        noise = self._noise(threads, control, spread)
        return Ratio(base, other, threads, batch, value, low, high, len(pair[0]), bool(noise),
                     dims, control, noise)  # fmt: skip

    def _control(
        self, threads: int, batch: int, dims: str, seed: int
    ) -> tuple[float, float] | None:
        if self.control is None:
            return None
        keys = [Key(f"{self.control}{end}", threads, batch, dims) for end in ("", AGAIN)]
        pair = [self.samples[key] for key in keys]
        _, low, high = bootstrap_ratio(*pair, level=CONTROL_LEVEL, seed=seed)
        return low, high

    def _noise(
        self, threads: int, control: tuple[float, float] | None, spread: list[Latency]
    ) -> str:
        if threads > self.cores:
            return f"{threads} threads share {self.cores:g} cores"
        apart = control is not None and max(control[0] - 1, 1 - control[1]) > CONTROL_BIAS
        if control is not None and apart:
            return f"machine too noisy: a model against itself {control[0]:.3f}–{control[1]:.3f}"
        if control is not None and control[1] - control[0] > CONTROL_WIDTH:
            return (
                f"machine too noisy: a model against itself is known to {control[0]:.3f}–"
                f"{control[1]:.3f} only"
            )
        if uneven := [one.name for one in spread if one.noisy]:
            return f"machine too noisy: p90 above {NOISY_SPREAD} × p50 of {', '.join(uneven)}"
        return ""

    def ratios(self, base: str, *, other: str | None = None, seed: int = 0) -> list[Ratio]:
        """Return every other model's ratio to `base`, or one's, at each threads, batch and dims."""
        return [
            self.ratio(base, key.name, threads=key.threads, batch=key.batch, dims=key.dims,
                       seed=seed)
            for key in self.samples
            if key.name != base and not key.name.endswith(AGAIN) and other in (None, key.name)
        ]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return the environment and latencies, without the samples, fit for JSON."""
        return {
            "environment": dict(self.environment),
            "latencies": [
                {**asdict(latency), "throughput": latency.throughput} for latency in self.latencies
            ],
        }


def median_interval(
    samples: NDArray[np.float64], level: float = LEVEL
) -> tuple[float, float] | tuple[None, None]:
    """Return the bounds of an interval for the median of samples (n,), by their order alone.

    x_(k) and x_(n+1-k), k the largest with P(B < k) ≤ (1 - level) / 2 for B binomial (n, ½):
    whatever the distribution, it holds the median at least as often as `level` says, if calls are
    independent. Those of one session aren't quite: slow ones come in bursts (see
    `bootstrap_ratio`), and what a session as a whole adds, say by where it lies in memory, is in
    none of them. So it is the least that is unknown of one model's p50; of two models in turns go
    by their ratio. None where no k does, as of fewer than 6 samples at 95 %.
    Source: Hahn & Meeker 1991, Statistical Intervals, section 5.2.
    """
    n = len(samples)
    place = np.arange(1, n + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(n + 1 - place) - np.log(place))])
    below = np.cumsum(np.exp(logs - n * np.log(2)))  # P(B ≤ i) for i = 0 … n
    k = int(np.searchsorted(below, (1 - level) / 2, side="right"))
    if k < 1:
        return None, None
    ordered = np.sort(samples)
    return float(ordered[k - 1]), float(ordered[n - k])


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
    value = float(np.median(other) / np.median(base))
    if (group := -(-n // _MAX_ROUNDS)) > 1:  # runs of rounds by their medians: the same interval
        n //= group
        base, other = (np.median(a[: n * group].reshape(n, group), 1) for a in (base, other))
    rng = np.random.default_rng(seed)
    block = max(1, round(n ** (1 / 3)))
    offsets = np.arange(block)
    ratios = np.empty(resamples)
    at_once = max(1, _VALUES_AT_ONCE // n)
    for first in range(0, resamples, at_once):
        count = min(at_once, resamples - first)
        starts = rng.integers(n, size=(count, -(-n // block)))
        rounds = ((starts[:, :, None] + offsets) % n).reshape(count, -1)[:, :n]
        ratios[first : first + count] = np.median(other[rounds], 1) / np.median(base[rounds], 1)
    low, high = np.quantile(ratios, ((1 - level) / 2, (1 + level) / 2))
    return value, float(low), float(high)
