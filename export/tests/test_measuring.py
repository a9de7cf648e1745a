"""Axes, controls and verdicts, pinned cores, memory, pictures, agreement; no time is asserted."""

import json
import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from slimfuse_export import BenchResult, ExportError, Key, bench
from slimfuse_export.bench import footprints
from slimfuse_export.cli import main
from slimfuse_export.environment import memory_limit
from slimfuse_export.latency import AGAIN, Latency
from slimfuse_export.measuring.affinity import pinned
from slimfuse_export.measuring.agreement import compare_benches
from slimfuse_export.measuring.plot import plot_bench

QUICK = {"warmup": 1, "min_seconds": 0.0, "min_runs": 5}


@pytest.fixture
def sequences(tmp_path):
    """A model of two dynamic dims that gives the sum of each row."""
    dims = ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axis"], ["y"], keepdims=0)],
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch_size"])],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    )
    path = tmp_path / "sums.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def made(other, control=1.0, spread=0.001, cores=2, threads=1, n=200):
    """Return a result of a base, itself again, and another model, as factors of a drift."""
    rng = np.random.default_rng(0)
    drift = rng.lognormal(0, 0.05, n)
    names = {"base": 1.0, f"base{AGAIN}": control, "other": other}
    samples = {
        Key(name, threads, 1): factor * drift * rng.lognormal(0, spread, n)
        for name, factor in names.items()
    }
    rows = tuple(Latency.of(key, times) for key, times in samples.items() if AGAIN not in key.name)
    return BenchResult(rows, samples, {"cpu": "x"}, "base", cores)


def test_sizes_of_dims_are_an_axis(sequences):
    result = bench({"a": sequences}, dims={"sequence_length": (3, 7)}, batch=(1, 2), **QUICK)
    assert [(row.batch, row.dims) for row in result.latencies] == [
        (1, "sequence_length=3"), (1, "sequence_length=7"),
        (2, "sequence_length=3"), (2, "sequence_length=7"),
    ]  # fmt: skip
    single = bench({"a": sequences}, dims={"sequence_length": 3}, **QUICK)
    assert [row.dims for row in single.latencies] == ["sequence_length=3"]
    with pytest.raises(ExportError, match="no inputs can be made"):
        bench({"a": sequences}, **QUICK)


def test_the_base_is_timed_against_itself(sequences):
    models = {"a": sequences, "b": sequences}
    result = bench(models, dims={"sequence_length": 3}, control=True, **QUICK)
    assert [row.name for row in result.latencies] == ["a", "b"]
    assert Key(f"a{AGAIN}", 1, 1, "sequence_length=3") in result.samples
    (ratio,) = result.ratios("a")
    assert ratio.other == "b"
    assert ratio.control[0] <= ratio.control[1]
    json.dumps(result.as_dict())


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (made(0.9), "faster"),
        (made(1.1), "slower"),
        (made(1.0), "no sure difference"),
        (made(0.995, control=0.99), "no sure difference"),  # the base gains as much on itself
        (made(0.5, control=0.9), "no verdict: machine too noisy: a model against itself 0.8"),
        (made(0.5, spread=0.6), "no verdict: machine too noisy: a model against itself is known"),
        (made(0.5, cores=1, threads=2), "no verdict: 2 threads share 1 cores"),
    ],
)
def test_verdicts_and_their_refusal(result, verdict):
    threads = next(iter(result.samples)).threads
    ratio = result.ratio("base", "other", threads=threads)
    assert ratio.verdict.startswith(verdict)
    assert ratio.noisy == verdict.startswith("no verdict")


def test_many_rounds_give_the_interval_of_few_medians():
    wide = made(0.9, n=30_001).ratio("base", "other")
    assert wide.low < 0.9 < wide.high
    assert wide.high - wide.low < 0.001  # 30 001 rounds of 0.1 % noise
    assert wide.n == 30_001


def test_throughput_counts_rows():
    assert Latency.of(Key("a", 1, 8), np.full(9, 4.0)).throughput == 2000  # 8 rows in 4 ms


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the platform can't pin")
def test_cores_are_pinned_and_given_back():
    before = os.sched_getaffinity(0)
    with pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores) == {max(before)}
    assert os.sched_getaffinity(0) == before
    with pinned(len(before) + 1) as cores:
        assert (cores, os.sched_getaffinity(0)) == ((), before)


def test_memory_and_load_time_are_those_of_a_fresh_process(write):
    grown = np.ones(5 * 10**7)  # 400 MB here, which is no part of what the model takes
    found = footprints({"a": write(), "wide": write("wide.onnx", hidden=300_000)}, batch=(1, 2))
    assert set(found) == {(name, rows, "") for name in ("a", "wide") for rows in (1, 2)}
    small, large = found["a", 1, ""], found["wide", 1, ""]
    assert small.load_ms > 0
    assert small.first_ms > 0
    if small.peak_rss is not None:
        assert small.peak_rss < grown.nbytes
        # 31 MB of weights, of which some come and go while the graph is optimised
        assert large.model_rss - small.model_rss > 25e6


def test_the_picture_is_svg_and_says_the_figures(sequences):
    result = bench({"<a&b>": sequences}, dims={"sequence_length": (3, 5)}, **QUICK)
    root = ElementTree.fromstring(plot_bench(result))
    words = " ".join(root.itertext())
    assert "<a&b>" in words
    assert "sequence_length 5" in words
    assert len(root.findall(".//{*}circle")) == 4  # p50 and p90 of two rows


def test_two_measurements_agree_or_not(tmp_path, capsys):
    def save(name, value, **more):
        row = {"base": "a", "other": "b", "threads": 1, "batch": 1, "value": value, "noisy": False}
        path = tmp_path / name
        path.write_text(json.dumps({"ratios": [row | more]}))
        return path

    one, two = save("one.json", 0.5), save("two.json", 0.54)
    (found,) = compare_benches(one, two)
    assert found.difference == pytest.approx(0.08, abs=1e-12)
    assert found.agrees
    assert compare_benches(two, one)[0].difference == found.difference
    far = save("far.json", 0.56)
    for words, code in (((one, two), 0), ((one, far), 3)):
        with pytest.raises(SystemExit) as caught:
            main(["bench", "--compare", *map(str, words)])
        assert caught.value.code == code
    assert "b : a" in capsys.readouterr().out
    with pytest.raises(ExportError, match="no ratio in common"):
        compare_benches(one, save("other.json", 0.5, batch=8))
    for bad in ("{}", "[]", '{"ratios": [1]}', "", '{"ratios": [{"value": 0, "noisy": true}]}'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ExportError, match="no file of"):
            compare_benches(one, tmp_path / "bad.json")


def test_the_verb_writes_its_picture_and_is_strict(write, tmp_path, capsys, monkeypatch):
    from slimfuse_export.cli import timing

    monkeypatch.setattr(timing, "run_bench", lambda *_, **__: made(0.5, control=0.9))
    words = ["bench", write("base.onnx"), write("other.onnx"), "--no-memory"]
    words += ["--plot", tmp_path / "p.svg", "--json"]
    for strict, code in (((), 0), (("--strict",), 3)):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in (*words, *strict)])
        assert caught.value.code == code
        out, err = capsys.readouterr()
    assert "no verdict: machine too noisy" in err
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    (row,) = json.loads(out)["ratios"]
    assert row["verdict"].startswith("no verdict")
    with pytest.raises(SystemExit) as caught:
        main(["bench"])
    assert caught.value.code == 2


def test_memory_limits_of_control_groups(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path, membership) is None
    (tmp_path / "outer" / "memory.max").write_text("1000000\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit(tmp_path, membership) == 10**6
