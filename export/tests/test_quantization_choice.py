"""Static INT8, 4 bits, the noise of products, and which file is good enough."""

import json
import math

import numpy as np
import onnx
import pytest
from slimfuse_export import (
    CheckFailed,
    ExportError,
    compare,
    disagreement,
    fallbacks,
    load_rows,
    lost_accuracy,
    open_session,
    product_noise,
    quantization_plan,
    quantize_dynamic_int8,
    quantize_int4,
    quantize_model,
    quantize_static_int8,
    read_metadata,
    run_session,
)
from slimfuse_export.quantization import choosing

ROWS = [
    {"pixel_values": np.random.default_rng(seed).standard_normal((9, 3, 7)).astype(np.float32)}
    for seed in (3, 4)
]


def logits(path, rows=ROWS[0]):
    return run_session(open_session(path, threads=1), rows)["logits"]


def kinds(path):
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def test_static_ranges_come_from_the_rows(write, tmp_path):
    source, target = write(), tmp_path / "static.onnx"
    assert quantize_static_int8(source, target, ROWS).products == 2
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(kinds(target))
    # as for dynamic INT8: about 1 % of noise, and not none
    assert 1e-4 < compare(logits(target), logits(source), atol=np.inf, rtol=0).rms_rel < 0.03
    narrow = [{"pixel_values": ROWS[0]["pixel_values"] / 100}]
    quantize_static_int8(source, target, narrow)  # inputs are cut at a hundredth of their range
    assert compare(logits(target), logits(source), atol=np.inf, rtol=0).rms_rel > 0.5
    with pytest.raises(ExportError, match="needs calibration"):
        quantize_static_int8(source, target, [])


def test_four_bits_are_a_sixteenth_of_the_range(write, tmp_path):
    source, target = write(hidden=64), tmp_path / "int4.onnx"
    assert quantize_int4(source, target).products == 2
    assert kinds(target).count("MatMulNBits") == 2
    error = compare(logits(target), logits(source), atol=np.inf, rtol=0).rms_rel
    # 15 steps over about ±2.5 σ of 32 normal weights: a step of σ/3, whose rms is a tenth of σ
    assert 0.03 < error < 0.3
    assert read_metadata(target).history == ("int4",)


@pytest.mark.parametrize("word", ["second", "w2"])
def test_named_products_stay_float(write, tmp_path, word):
    source = write()
    for write_file in (quantize_dynamic_int8, quantize_int4):
        done = write_file(source, tmp_path / "mixed.onnx", keep_float=[word])
        assert (done.products, done.kept_float) == (1, (word,))
    done = quantize_static_int8(source, tmp_path / "mixed.onnx", ROWS, keep_float=[word])
    assert done.products == 1
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in
              onnx.load(str(tmp_path / "mixed.onnx")).graph.initializer}  # fmt: skip
    assert stored["w2"].dtype == np.float32
    with pytest.raises(ExportError, match="not the name of a product"):
        quantize_dynamic_int8(source, tmp_path / "mixed.onnx", keep_float=["third"])


@pytest.mark.parametrize("mode", ["dynamic", "static", "int4"])
def test_noise_is_that_of_the_product_alone(write, tmp_path, mode):
    source, both, alone = write(), tmp_path / "both.onnx", tmp_path / "alone.onnx"
    plan = quantization_plan()
    choosing.write_mode(source, both, mode, plan=plan, inputs=ROWS)
    found = {one.product: one.sqnr for one in product_noise(source, both, ROWS)}
    # independent: the second product quantised alone is the model's only noise
    choosing.write_mode(source, alone, mode, plan=plan, inputs=ROWS, keep_float=["first"])
    y = np.concatenate([logits(source, rows) for rows in ROWS]).astype(np.float64)
    y_hat = np.concatenate([logits(alone, rows) for rows in ROWS]).astype(np.float64)
    expected = 10 * math.log10(np.sum(y**2) / np.sum((y - y_hat) ** 2))
    assert found["second"] == pytest.approx(expected, abs=0.01)  # dB; float32 of two graphs
    kept = {one.product: one.sqnr for one in product_noise(source, alone, ROWS)}
    assert kept["first"] == math.inf


def test_the_noisiest_go_first_an_eighth_at_a_time():
    names = [f"p{i}" for i in range(17)]
    lists = list(fallbacks(names, ["p3"]))
    assert [len(one) for one in lists] == [3, 5, 7, 9]  # 16 are left: twos, up to half
    assert lists[1] == ("p3", "p0", "p1", "p2", "p4")
    assert list(fallbacks(names[:1])) == []


def attempts(done):
    return [(one.mode, len(one.kept_float), one.good_enough) for one in done.attempts]


def test_what_loses_too_much_keeps_noisy_products_float(write, tmp_path):
    source, target = write(), tmp_path / "out.onnx"
    calls = []

    def loss(path):
        calls.append(path)
        return 0.5 if len(calls) == 1 else 0.0

    done = quantize_model(source, target, loss=loss, inputs=ROWS, mode="dynamic")
    assert attempts(done) == [("dynamic", 0, False), ("dynamic", 1, True)]
    whole = tmp_path / "whole.onnx"
    quantize_dynamic_int8(source, whole, reduce_range=quantization_plan().reduce_range)
    assert done.made.kept_float == (product_noise(source, whole, ROWS)[0].product,)
    assert kinds(target).count("MatMulInteger") == 1


def test_none_is_written_where_none_is_good_enough(write, tmp_path):
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    done = quantize_model(write(), target, loss=lambda _: 0.02, inputs=ROWS)
    assert done.made is None
    assert {one.mode for one in done.attempts} == {"dynamic", "static"}
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(("factor", "mode"), [(0.8, "static"), (1.0, "dynamic"), (1.3, "dynamic")])
def test_static_must_be_surely_faster(write, tmp_path, monkeypatch, factor, mode):
    from slimfuse_export import BenchResult, Key

    def bench(models, **_):
        names = (*models, "dynamic (again)")
        drift = np.random.default_rng(0).lognormal(0, 0.02, 60)
        samples = {
            Key(n, 1, 1): drift * (factor if n == "static" else 1) *
            np.random.default_rng(i).lognormal(0, 0.001, 60) for i, n in enumerate(names)
        }  # fmt: skip
        return BenchResult((), samples, {}, "dynamic", cores=1)

    monkeypatch.setattr(choosing, "bench", bench)
    target = tmp_path / "out.onnx"
    done = quantize_model(
        write(), target, loss=lambda _: 0.0, inputs=ROWS, make_inputs=lambda rows: ROWS[0]
    )
    assert done.made.mode == mode
    assert read_metadata(target).history == (f"{mode} INT8",)
    assert "static takes" in done.reason


def test_large_models_get_four_bits(write, monkeypatch):
    monkeypatch.setattr(choosing, "LARGE", 4 * (21 * 34 + 34 * 5))
    modes, reason = choosing.choose_modes(write(), "auto", quantization_plan())
    assert modes == ["int4"]
    assert "weights" in reason
    assert choosing.choose_modes(write(hidden=33), "auto", quantization_plan())[0] == [
        "dynamic", "static",
    ]  # fmt: skip
    with pytest.raises(ExportError, match="unknown mode"):
        quantize_model("x", "y", loss=lambda _: 0.0, inputs=ROWS, mode="int2")


def test_losses_of_answers_and_of_accuracy(write):
    source, other = write(), write("other.onnx", shift=100.0)  # class 2 always wins
    truth = np.concatenate([logits(source, rows).argmax(-1) for rows in ROWS])
    share = float(np.mean(truth != 2))
    assert 0 < share < 1
    assert disagreement(source, ROWS)(source) == 0
    assert disagreement(source, ROWS)(other) == pytest.approx(share, abs=1e-12)
    assert lost_accuracy(source, ROWS, truth)(other) == pytest.approx(share, abs=1e-12)
    unasked = np.where(truth == 2, truth, -1)  # only rows of class 2 count
    assert lost_accuracy(source, ROWS, unasked)(other) == 0
    with pytest.raises(ExportError, match="labels don't fit"):
        lost_accuracy(source, ROWS, truth[:-1])


def test_rows_and_labels_of_a_file(finished, tmp_path):
    path = tmp_path / "rows.npz"
    pixels = np.concatenate([rows["pixel_values"] for rows in ROWS])
    np.savez(path, pixel_values=pixels, labels=np.arange(18))
    chunks, labels = load_rows(path)
    assert [len(one["pixel_values"]) for one in chunks] == [16, 2]
    assert np.array_equal(np.concatenate([one["pixel_values"] for one in chunks]), pixels)
    assert np.array_equal(labels, np.arange(18))
    cases, none = load_rows(finished / "onnx" / "samples.npz")
    assert ([len(one["pixel_values"]) for one in cases], none) == ([2, 7], None)
    for bad in ({"labels": np.ones(3)}, {"x": np.ones(3), "labels": np.ones(2)}, {"x": np.ones(0)}):
        np.savez(path, **bad)
        with pytest.raises(ExportError, match="no rows of inputs"):
            load_rows(path)
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(ExportError, match="holds no rows"):
        load_rows(path)
    with pytest.raises(ExportError, match="does not exist"):
        load_rows(tmp_path / "none.npz")


def test_the_verb_refuses_and_says_why(finished, tmp_path, capsys):
    from slimfuse_export.cli import main

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main(["quantize", str(finished), *map(str, words)])
        return caught.value.code, *capsys.readouterr()

    code, out, err = run("--mode", "static", "--json")
    assert code == 0
    assert "static was asked for" in err
    assert json.loads(out)["attempts"]
    rows = np.concatenate([rows["pixel_values"] for rows in ROWS])
    wrong = (logits(finished / "onnx" / "model.onnx", {"pixel_values": rows}).argmax(-1) + 1) % 5
    np.savez(tmp_path / "labelled.npz", pixel_values=rows, labels=wrong)
    labelled = ("--mode", "dynamic", "--labelled", tmp_path / "labelled.npz")
    assert run(*labelled)[0] == 0  # nothing can be lost where nothing was right
    code, _, err = run("--labelled", finished / "onnx" / "samples.npz")
    assert (code, "no array of labels" in err) == (2, True)
    assert run("--max-drop", "2")[0] == 2
    assert CheckFailed.exit_code == 3
