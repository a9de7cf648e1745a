"""Interleaving, figures and intervals; nothing here hangs on how fast the machine is."""

import gc
import json
import math

import numpy as np
import pytest
from slimfuse_export import BenchResult, ExportError, Key, Latency, bench, bootstrap_ratio
from slimfuse_export import environment as machine
from slimfuse_export.environment import cpu_quota
from slimfuse_export.latency import median_interval

QUICK = {"warmup": 1, "min_seconds": 0.0, "min_runs": 7}


def test_every_model_is_timed_in_every_round(write, monkeypatch):
    from slimfuse_export.bench import _Runner

    models = {name: write(f"{name}.onnx", seed=i) for i, name in enumerate(("a", "b", "c"))}
    calls, call = [], _Runner.call
    monkeypatch.setattr(_Runner, "call", lambda runner: (calls.append(runner), call(runner)))
    result = bench(models, threads=(1,), batch=(3,), **QUICK)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 7
    assert all(len(set(map(id, one))) == 3 for one in rounds)
    assert len({tuple(map(id, one)) for one in rounds}) > 1  # shuffled
    assert {latency.name: latency.n for latency in result.latencies} == {"a": 7, "b": 7, "c": 7}


def test_every_threads_and_batch_is_timed_and_told(write):
    said = []
    result = bench(
        {"a": write()},
        threads=(1, 2),
        batch=(1, 5),
        progress=lambda done, label: said.append((done, label)),
        **QUICK,
    )
    expected = [("a", 1, 1), ("a", 1, 5), ("a", 2, 1), ("a", 2, 5)]
    assert [(r.name, r.threads, r.batch) for r in result.latencies] == expected
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[0] == (0.0, "1 thread, batch 1")
    assert said[-1] == (1.0, "2 threads, batch 5")
    for row in result.latencies:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
    assert gc.isenabled()
    json.dumps(result.as_dict())


def test_time_and_run_limits(write):
    models = {"a": write()}
    options = {"warmup": 0, "min_runs": 4}
    assert bench(models, min_seconds=1e9, max_runs=11, **options).latencies[0].n == 11
    timed = bench(models, min_seconds=0.02, max_runs=10**9, **options)
    assert timed.samples[Key("a", 1, 1)].sum() >= 20  # ms


def test_given_inputs_are_used_and_the_surplus_is_dropped(write):
    asked = []

    def make(batch):
        asked.append(batch)
        return {"pixel_values": np.ones((batch, 3, 7), np.float32), "token_type_ids": np.ones(1)}

    bench({"a": write(), "b": write("b.onnx")}, make_inputs=make, batch=(5,), **QUICK)
    assert set(asked) == {5}
    with pytest.raises(ExportError, match="missing inputs: pixel_values"):
        bench({"a": write()}, make_inputs=lambda batch: {}, **QUICK)


@pytest.mark.parametrize(
    "setting",
    [{"threads": ()}, {"threads": (0,)}, {"batch": (2, 2)}, {"min_runs": 1}, {"max_runs": 3}],
)
def test_bad_settings_are_refused(write, setting):
    with pytest.raises(ExportError, match=next(iter(setting))):
        bench({"a": write()}, **(QUICK | setting))
    with pytest.raises(ExportError, match="models"):
        bench({})


def made(base, other):
    keys = [Key(name, 1, 1) for name in ("base", "other")]
    samples = dict(zip(keys, (base, other), strict=True))
    return BenchResult(tuple(Latency.of(k, s) for k, s in samples.items()), samples, {})


def test_percentiles_and_the_noise_flag():
    row = Latency.of(Key("a", 2, 3), np.arange(1.0, 102.0))
    assert (row.p50_ms, row.p90_ms, row.p99_ms, row.mean_ms, row.n) == (51, 91, 100, 51, 101)
    assert row.noisy
    assert not Latency.of(Key("a", 2, 3), np.linspace(10, 12, 99)).noisy


@pytest.mark.parametrize("n", [2, 5, 6, 31, 100, 1001])
def test_the_medians_interval_is_that_of_the_binomial(n):
    # by counting: the interval misses the median where fewer than k samples lie on one side
    tails = [sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n // 2 + 1)]
    k = max(i for i, tail in enumerate(tails) if tail <= 0.025)
    samples = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert median_interval(samples) == ((k, n + 1 - k) if k else (None, None))


def test_the_medians_interval_holds_it_whatever_the_distribution():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = median_interval(rng.exponential(size=60) ** 2)
        hits += low <= np.log(2) ** 2 <= high
    assert hits >= 182  # of 200 at 95 % or more: fewer has probability below 1 %
    row = Latency.of(Key("a", 1, 1), rng.lognormal(size=60))
    assert row.p50_low_ms < row.p50_ms < row.p50_high_ms
    many = rng.normal(10, 1, 300_000)  # as many calls as a tiny model gets in minutes
    low, high = median_interval(many)
    assert high - low == pytest.approx(
        2 * 1.96 * np.sqrt(np.pi / 2 / len(many)), rel=0.15
    )  # 1 073 ranks: 3 % scatter


def test_the_interval_contains_the_truth_as_often_as_it_says():
    hits, trials, truth = 0, 60, 0.4
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        burst = np.repeat(rng.lognormal(0, 0.3, 40), 5)  # slows both models of five rounds
        base = 3.0 * burst * rng.lognormal(0, 0.05, 200)
        other = 3.0 * truth * burst * rng.lognormal(0, 0.05, 200)
        _, low, high = bootstrap_ratio(base, other, resamples=200, seed=seed)
        hits += low <= truth <= high
    assert hits >= 51  # of 60 at 95 %: fewer has probability below 0.1 %
    ratio = made(base, other).ratio("base", "other", seed=1)
    assert ratio.low < ratio.value < ratio.high < 0.6
    assert ratio.speedup == 1 / ratio.value
    assert ratio == made(base, other).ratio("base", "other", seed=1)
    assert ratio != made(base, other).ratio("base", "other", seed=2)


def test_pairing_cancels_shared_drift():
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 0.5, 301)
    value, low, high = bootstrap_ratio(base, 0.5 * base, seed=0)
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-12)  # float64, exact
    _, low, high = bootstrap_ratio(base, 0.5 * rng.permutation(base), seed=0)
    assert high - low > 0.02


def test_a_ratio_needs_what_was_measured():
    result = made(np.ones(5), np.ones(5))
    assert [ratio.other for ratio in result.ratios("base")] == ["other"]
    with pytest.raises(ExportError, match="not measured") as caught:
        result.ratio("base", "missing")
    assert "('missing', 1, 1, '')" in str(caught.value)
    with pytest.raises(ExportError, match="paired rounds"):
        bootstrap_ratio(np.ones(5), np.ones(4))


def test_the_environment_names_the_machine_but_not_its_owner():
    import os
    import platform

    conditions = machine()
    assert conditions["cores_allowed"] >= 1
    text = json.dumps(conditions)
    assert platform.node() not in text
    assert os.sep + "work" not in text


def test_control_group_limits(tmp_path):
    membership = tmp_path / "membership"
    assert cpu_quota(tmp_path, membership) is None
    membership.write_text("0::/outer/inner\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path, membership) is None
    (tmp_path / "outer" / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path, membership) == 1.5
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert cpu_quota(tmp_path, membership) == 1.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    assert cpu_quota(tmp_path, membership) == 0.5
