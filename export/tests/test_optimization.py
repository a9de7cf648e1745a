"""What is tried, and what may win; the times are made up, so nothing hangs on the machine."""

import json

import numpy as np
import onnx
import pytest
from slimfuse_export import BenchResult, Key, check_folder, optimize_folder, read_metadata
from slimfuse_export.latency import AGAIN
from slimfuse_export.optimization import candidates as made
from slimfuse_export.optimization import choosing

MODEL, BESIDE = "onnx/model.onnx", "onnx/model_optimized.onnx"


@pytest.fixture
def times(monkeypatch):
    """Answer every bench with a model's factor over a plain 10 ms; a list: one for each call."""
    factors, calls = {}, []

    def bench(models, *, threads, batch, **_):
        calls.append(list(models))
        drift = np.random.default_rng(0).lognormal(0, 0.02, 60)  # the same for all in a round
        samples = {}
        for name in (*models, choosing.PLAIN + AGAIN):
            factor = factors.get(name, 1.0)
            factor = factor[len(calls) - 1] if isinstance(factor, list) else factor
            own = np.random.default_rng(len(name)).lognormal(0, 0.001, 60)
            samples |= {Key(name, t, b): 10 * factor * drift * own for t in threads for b in batch}
        return BenchResult((), samples, {}, choosing.PLAIN, cores=2)

    def slow(*_):
        raise made.NotTried("other tools are tried in a test of their own")

    monkeypatch.setattr(choosing, "bench", bench)
    monkeypatch.setattr(made, "_slimmed", slow)
    factors["calls"] = calls
    return factors


def outcomes(done):
    return {trial.name: trial.outcome for trial in done.trials}


def test_nothing_changes_where_nothing_wins(finished, times):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    done = optimize_folder(finished, replace=True)
    assert (done.winner, done.written) == (None, None)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    found = outcomes(done)
    assert set(found) >= {
        "onnxruntime basic", "onnxruntime extended", "onnxruntime all", "float16", "onnxslim",
        "onnxruntime.transformers fusions", "opset 21", "opset 22", "opset 23", "opset 24",
    }  # fmt: skip
    assert "won" not in found.values()
    reasons = {trial.name: trial.reason for trial in done.trials}
    assert "CPU provider" in reasons["float16"]
    assert "no fusions are known" in reasons["onnxruntime.transformers fusions"]
    assert "no difference that is sure" in reasons["opset 21"]
    timed = {name for name, found in outcomes(done).items() if found == "lost"}
    assert set(times["calls"][0]) == {choosing.PLAIN, *timed}
    json.dumps(done.as_dict())


def test_a_winner_lies_beside_the_model_and_says_what_it_is(finished, times):
    times["opset 22"] = 0.8
    plain = (finished / MODEL).read_bytes()
    done = optimize_folder(finished, threads=(1, 2), batch=(1, 3))
    assert (done.winner, done.written) == ("opset 22", finished / BESIDE)
    won = next(trial for trial in done.trials if trial.outcome == "won")
    assert [ratio.value for ratio in won.ratios] == pytest.approx([0.8] * 4, rel=0.01)
    assert (finished / MODEL).read_bytes() == plain
    found = read_metadata(finished / BESIDE)
    assert (found.opset, found.min_onnxruntime) == (22, "1.21")
    assert found.history == ("export", "optimize: opset 22")
    assert not found.machine_specific
    assert times["calls"][1] == [choosing.PLAIN, "opset 22"]  # timed again, alone


def test_a_replaced_model_passes_every_check(finished, times):
    times["opset 21"] = 0.9
    done = optimize_folder(finished, replace=True)
    assert done.written == finished / MODEL
    assert not (finished / BESIDE).exists()
    assert read_metadata(finished / MODEL).opset == 21
    assert [r.name for r in check_folder(finished) if not r.passed] == []


def test_a_graph_of_this_machine_never_travels(finished, times):
    times |= {"onnxruntime all": 0.5, "opset 21": 0.9}
    assert optimize_folder(finished, replace=True).winner == "opset 21"
    done = optimize_folder(finished)
    assert (done.winner, done.written) == ("onnxruntime all", finished / BESIDE)
    assert read_metadata(finished / BESIDE).machine_specific


def test_a_gain_must_be_sure_large_enough_and_come_again(finished, times):
    times |= {"opset 21": 0.99, "opset 22": 1.2, "opset 23": [0.5, 1.0], "opset 24": 0.9}
    done = optimize_folder(finished)
    assert done.winner == "opset 24"
    reasons = {trial.name: trial.reason for trial in done.trials}
    assert "less than the 2%" in reasons["opset 21"]
    assert "slower" in reasons["opset 22"]
    assert "won once, not again" in reasons["opset 23"]


def test_a_noisy_machine_lets_nothing_win(finished, times):
    times |= {"opset 21": 0.5, choosing.PLAIN + AGAIN: 0.9}
    done = optimize_folder(finished)
    assert done.winner is None
    assert "no verdict" in {t.name: t.reason for t in done.trials}["opset 21"]


def test_onnxslim_runs_in_a_process_of_its_own(write, tmp_path):
    pytest.importorskip("onnxslim")
    made._slimmed(write(), tmp_path / "slim.onnx")
    onnx.checker.check_model(str(tmp_path / "slim.onnx"))


def test_other_answers_other_inputs_and_broken_tools_fail(finished, times, write, monkeypatch):
    def tried(source, config):
        def shifted(_, target):
            write(target.name, shift=0.01).replace(target)

        def renamed(_, target):
            model = onnx.load(str(source))
            model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
            onnx.save(model, str(target))

        def broken(_, target):
            made._apart("raise SystemExit('it is broken')")

        for name, make in (("shifted", shifted), ("renamed", renamed), ("broken", broken)):
            yield made.Candidate(name, True, make)

    monkeypatch.setattr(choosing, "candidates", tried)
    done = optimize_folder(finished)
    assert set(outcomes(done).values()) == {"failed"}
    reasons = {trial.name: trial.reason for trial in done.trials}
    assert "differs from its reference" in reasons["shifted"]
    assert "not what they were" in reasons["renamed"]
    assert "it is broken" in reasons["broken"]


def test_operators_of_one_machine_are_seen(finished, times, monkeypatch):
    def foreign(source, target):
        model = onnx.load(str(source))
        model.graph.node[0].domain = "com.microsoft.nchwc"
        onnx.save(model, str(target))

    monkeypatch.setattr(choosing, "check_cases", lambda *_, **__: (0.0, 1))  # it can't be opened
    monkeypatch.setattr(
        choosing, "candidates", lambda *_: [made.Candidate("blocked", True, foreign)]
    )
    assert [trial.portable for trial in optimize_folder(finished).trials] == [False]


def test_a_folder_without_samples_is_held_to_its_own_answers(finished, times):
    (finished / "onnx" / "samples.npz").unlink()
    times["opset 21"] = 0.9
    assert optimize_folder(finished).winner == "opset 21"
