"""Parity, reference files and whole folders: each check has a case that makes it fail."""

import json
import zipfile

import numpy as np
import onnx
import pytest
from slimfuse_export import (
    CheckFailed,
    ExportError,
    check_folder,
    check_parity,
    compare,
    load_reference,
    open_session,
    run_session,
    save_reference,
)

X = {"pixel_values": np.random.default_rng(4).standard_normal((3, 3, 7)).astype(np.float32)}


def forward(path):
    """The tiny model in float64 numpy, as independent truth."""
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    w1, w2, b2 = (weights[name].astype(np.float64) for name in ("w1", "w2", "b2"))
    return np.maximum(X["pixel_values"].reshape(3, -1).astype(np.float64) @ w1, 0) @ w2.T + b2


def test_parity_with_independent_arithmetic(write):
    parity = check_parity(write(), X, forward(write()), atol=1e-5, rtol=0)  # float32, 34 terms
    assert 0 < parity.max_abs < 1e-5
    assert parity.max_rel < 1e-5
    assert parity.n == 15
    assert parity.shapes == {"pixel_values": (3, 3, 7), "logits": (3, 5)}


def test_a_perturbed_graph_fails(write):
    truth = forward(write())
    with pytest.raises(CheckFailed, match=r"max \|Δ\| 0\.01; 3 of 15 values"):
        check_parity(write("shifted.onnx", shift=0.01), X, truth, atol=1e-3, rtol=1e-6)


def test_non_finite_values_and_other_shapes_fail():
    ones = np.ones((2, 3), np.float32)
    bad = ones.copy()
    bad[1, 2] = np.nan
    with pytest.raises(CheckFailed, match="output is not finite"):
        compare(bad, ones, atol=np.inf, rtol=0)
    with pytest.raises(CheckFailed, match="reference is not finite"):
        compare(ones, bad, atol=np.inf, rtol=0)
    with pytest.raises(CheckFailed, match="shapes differ"):
        compare(ones[:1], ones, atol=np.inf, rtol=0)  # would broadcast
    with pytest.raises(CheckFailed, match="nothing to compare"):
        compare(ones[:0], ones[:0], atol=0, rtol=0)


def test_the_figures_of_parity():
    parity = compare(np.array([3.0, 4.5]), np.array([3.0, -4.0]) * [1, -1], atol=0.5, rtol=0)
    assert (parity.max_abs, parity.max_rel, parity.rms_rel) == (0.5, 0.125, 0.1)


def test_references_come_back_with_their_names_shapes_and_types(tmp_path):
    cases = [
        ({"input_ids": np.arange(6).reshape(2, 3), "a/b": np.ones(2, bool)}, {"logits": np.eye(2)}),
        ({"input_ids": np.arange(35).reshape(7, 5)}, {"logits": np.ones((7, 5), np.float32)}),
    ]
    path = tmp_path / "samples.npz"
    save_reference(path, cases)
    loaded = load_reference(path)
    assert [sorted(case.inputs) for case in loaded] == [["a/b", "input_ids"], ["input_ids"]]
    for case, (inputs, outputs) in zip(loaded, cases, strict=True):
        for name, value in (inputs | outputs).items():
            got = (case.inputs | case.outputs)[name]
            assert got.dtype == value.dtype
            assert np.array_equal(got, value)
    with zipfile.ZipFile(path) as archive:  # no clock in it: equal cases, equal bytes
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_bad_references_are_refused(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(ExportError, match="Python objects"):
        save_reference(path, [({"x": np.array([{}])}, {"y": np.ones(1)})])
    with pytest.raises(ExportError, match="no cases"):
        save_reference(path, [])
    assert not path.exists()
    np.savez(path, **{"0/inputs/x": np.array([{}], object), "0/outputs/y": np.ones(1)})
    with pytest.raises(ExportError, match="holds no reference cases"):
        load_reference(path)  # refuses to unpickle
    for content in (b"", b"PK garbage", np.ones(3).tobytes()):
        path.write_bytes(content)
        with pytest.raises(ExportError, match="holds no reference cases"):
            load_reference(path)
    np.savez(path, x=np.ones(2))
    with pytest.raises(ExportError, match="holds no reference cases"):
        load_reference(path)
    np.savez(path, **{"0/inputs/x": np.ones(2)})
    with pytest.raises(ExportError, match="lacks inputs or outputs"):
        load_reference(path)


def failures(folder):
    return {result.name for result in check_folder(folder) if not result.passed}


def test_a_finished_folder_passes(finished):
    results = check_folder(finished)
    assert [result.name for result in results if not result.passed] == []
    assert len(results) == 14
    assert "TinyForTests" in results[0].detail


def test_a_folder_without_samples_or_int8_passes(finished):
    (finished / "onnx" / "samples.npz").unlink()
    (finished / "onnx" / "model_quantized.onnx").unlink()
    assert failures(finished) == set()
    assert len(check_folder(finished)) == 7


def test_an_empty_folder_names_every_gap(tmp_path):
    assert {"config.json", "model.safetensors", "onnx/model.onnx: graph"} <= failures(tmp_path)
    with pytest.raises(ExportError, match="no such folder"):
        check_folder(tmp_path / "none")


def test_each_broken_part_is_found(finished, write):
    weights = finished / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-1], whole + b"\0", whole[:4], b"", (2**62).to_bytes(8, "little")):
        weights.write_bytes(broken)
        assert failures(finished) == {"model.safetensors"}
    weights.write_bytes(whole)
    (finished / "config.json").write_text(json.dumps([]))
    assert failures(finished) == {"config.json"}
    (finished / "config.json").write_text("{}")
    write("run/model/onnx/model.onnx", shift=0.05)
    assert failures(finished) == {"onnx/model.onnx: samples"}
    write("run/model/onnx/model.onnx", batch="s18")
    assert failures(finished) == {"onnx/model.onnx: dims"}
    write("run/model/onnx/model.onnx", batch=3)
    assert failures(finished) == {"onnx/model.onnx: dims", "onnx/model.onnx: sizes"} | (
        {"onnx/model_quantized.onnx: error"}  # has nothing to be compared with
    )


def test_an_int8_model_of_other_weights_is_found(finished, write):
    write("run/model/onnx/model_quantized.onnx", seed=8)
    assert failures(finished) == {"onnx/model_quantized.onnx: error"}


def test_rows_that_hang_on_their_batch_are_found(finished):
    path = finished / "onnx" / "model.onnx"
    model = onnx.load(str(path))
    node = model.graph.node[0]  # flat = flatten(pixel_values) − its mean over the batch
    node.output[0] = "raw"
    mean = onnx.helper.make_node("ReduceMax", ["raw", "axis"], ["top"], keepdims=1)
    minus = onnx.helper.make_node("Sub", ["raw", "top"], ["flat"])
    model.graph.node.insert(1, mean)
    model.graph.node.insert(2, minus)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axis"))
    onnx.save(model, str(path))
    assert "onnx/model.onnx: rows" in failures(finished)


def test_a_session_runs_what_parity_ran(write):
    logits = run_session(open_session(write(), threads=1), X)["logits"]
    assert check_parity(write(), X, logits, atol=0, rtol=0).max_abs == 0


def test_a_small_value_among_large_ones_may_be_off_like_those():
    truth = np.array([0.0, 100.0, -100.0])  # rms 81.6
    assert compare(
        truth + np.array([0.008, 0, 0]), truth, atol=0, rtol=1e-4
    ).max_abs == pytest.approx(0.008)
    with pytest.raises(CheckFailed, match=r"max\(\|reference\|, 81.6\)"):
        compare(truth + np.array([0.009, 0, 0]), truth, atol=0, rtol=1e-4)
