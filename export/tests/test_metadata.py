"""What a file says of itself, and that it stays said."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from slimfuse_export import (
    ExportError,
    Provenance,
    check_folder,
    inspect_model,
    min_onnxruntime,
    quantize_dynamic_int8,
    quantize_int4,
    read_metadata,
    stamp,
    stamp_file,
)

MADE_OF = Provenance("ab" * 32, {"a": "sha256:cd", "b": "trained"}, {"a": "mit", "b": "unknown"})


def test_what_is_written_is_read_and_equal_files_give_equal_bytes(write):
    paths = [write("a.onnx"), write("b.onnx")]
    assert read_metadata(paths[0]) is None
    for path in paths:
        stamp_file(path, step="export", provenance=MADE_OF)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    found = read_metadata(paths[0])
    assert (found.opset, found.min_onnxruntime, found.producer) == (20, "1.19", "slimfuse")
    assert (found.history, found.provenance) == (("export",), MADE_OF)
    once = paths[0].read_bytes()
    stamp_file(paths[0])  # nothing new: nothing changes
    assert paths[0].read_bytes() == once
    onnx.checker.check_model(str(paths[0]), full_check=True)


def test_quantising_keeps_it_and_adds_its_step(write, tmp_path):
    source, target = write(hidden=64), tmp_path / "small.onnx"
    stamp_file(source, step="export", provenance=MADE_OF)
    quantize_dynamic_int8(source, target, keep_float=["first"])
    found = read_metadata(target)
    assert found.provenance == MADE_OF
    assert found.history == ("export", "dynamic INT8, 1 float")
    quantize_int4(source, target)
    assert read_metadata(target).history == ("export", "int4")


def test_other_metadata_is_left_alone(write):
    path = write()
    model = onnx.load(str(path))
    model.metadata_props.add(key="theirs", value="kept")
    stamp(model, step="export")
    assert {p.key for p in model.metadata_props} >= {"theirs", "slimfuse.opset"}


@pytest.mark.parametrize(
    ("opset", "ir", "release"),
    [(20, 10, "1.19"), (22, 10, "1.21"), (23, 11, "1.23"), (20, 12, "1.24"), (18, 8, "1.19")],
)
def test_the_first_onnxruntime_is_that_of_opset_and_format(write, opset, ir, release):
    model = onnx.load(str(write()))
    model.ir_version, model.opset_import[0].version = ir, opset
    assert min_onnxruntime(model) == release


def test_what_is_too_new_is_refused(write):
    model = onnx.load(str(write()))
    model.opset_import[0].version = 99
    with pytest.raises(ExportError, match="operator set is too new"):
        min_onnxruntime(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [("provenance", "{"), ("provenance", '{"x": 1}'), ("history", "[1]"), ("opset", "many")],
)
def test_what_is_unreadable_is_said(write, key, value):
    path = write()
    stamp_file(path, step="export")
    model = onnx.load(str(path))
    kept = [(p.key, p.value) for p in model.metadata_props if p.key != f"slimfuse.{key}"]
    del model.metadata_props[:]
    for one in (*kept, (f"slimfuse.{key}", value)):
        model.metadata_props.add(key=one[0], value=one[1])
    onnx.save(model, str(path))
    with pytest.raises(ExportError, match="metadata can't be read"):
        read_metadata(path)


def test_the_facts_of_a_file(write, tmp_path):
    path = write(hidden=64)
    model = onnx.load(str(path))
    w1 = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    w1[:, :32] = 0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w1, "w1"))
    onnx.save(model, str(path))
    facts = inspect_model(path)
    weights = 21 * 64 + 5 * 64
    assert (facts.params, facts.precision) == (weights + 5, {"float": weights + 5})
    assert facts.zeros == pytest.approx(21 * 32 / weights, abs=1e-12)
    assert facts.operators == {"Flatten": 1, "MatMul": 1, "Relu": 1, "Gemm": 1}
    assert facts.inputs == {"pixel_values": ("batch_size", 3, 7)}
    assert facts.outputs == {"logits": ("batch_size", 5)}
    json.dumps(facts.as_dict())
    quantize_int4(path, tmp_path / "int4.onnx")
    small = inspect_model(tmp_path / "int4.onnx")
    padded = 32 * 64 + 64 * 5  # 21 rows are filled up to a block of 32
    assert small.precision["int4"] == padded
    assert small.operators["com.microsoft.MatMulNBits"] == 2
    assert small.zeros == 0  # packed weights are not counted


def test_inspect_prints_the_provenance(finished, capsys):
    from slimfuse_export.cli import main

    stamp_file(finished / "onnx" / "model.onnx", step="export", provenance=MADE_OF)
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(finished)])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"sha256 {MADE_OF.recipe}" in out
    assert "sha256:cd, licence mit" in out
    with pytest.raises(SystemExit):
        main(["inspect", str(finished), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["model.onnx"]["metadata"]["provenance"]["licences"] == {"a": "mit", "b": "unknown"}
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(finished.parent)])
    assert caught.value.code == 2


def failures(folder):
    return {result.name for result in check_folder(folder) if not result.passed}


def test_check_finds_metadata_that_lacks_or_lies(finished):
    path = finished / "onnx" / "model.onnx"
    model = onnx.load(str(path))
    stamp(model, machine_specific=True)
    onnx.save(model, str(path))
    assert failures(finished) == {"onnx/model.onnx: metadata"}  # it is the folder's default
    next(p for p in model.metadata_props if p.key == "slimfuse.opset").value = "21"
    del model.metadata_props[-1]
    onnx.save(model, str(path))
    assert failures(finished) == {"onnx/model.onnx: metadata"}
    del model.metadata_props[:]
    onnx.save(model, str(path))
    assert failures(finished) == {"onnx/model.onnx: metadata"}


def test_check_compares_the_files_and_the_recipe_beside(finished):
    lock = finished.parent / "recipe.lock.yaml"
    lock.write_text("version: 1\n")
    mine = Provenance(hashlib.sha256(lock.read_bytes()).hexdigest())
    stamp_file(finished / "onnx" / "model.onnx", provenance=mine)
    assert failures(finished) == {"onnx/model_quantized.onnx: metadata"}
    stamp_file(finished / "onnx" / "model_quantized.onnx", provenance=mine)
    assert failures(finished) == set()
    lock.write_text("version: 1\nname: other\n")
    assert failures(finished) == {"recipe.lock.yaml"}


def test_check_refuses_an_older_onnxruntime(finished, monkeypatch):
    from slimfuse_export import folder_parts

    monkeypatch.setattr(folder_parts, "version", lambda _: "1.18.1")
    assert failures(finished) == {
        "onnx/model.onnx: metadata", "onnx/model_quantized.onnx: metadata",
    }  # fmt: skip


def test_check_runs_odd_sizes_of_every_dynamic_dim(finished):
    dims = ["batch_size", 3, "width"]

    def save(nodes, *weights):
        graph = onnx.helper.make_graph(
            nodes, "sizes",
            [onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, dims)],
            [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, dims)],
            [onnx.numpy_helper.from_array(w, name) for name, w in weights],
        )  # fmt: skip
        opsets = [onnx.helper.make_opsetid("", 20)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        stamp(model, step="export")
        onnx.save(model, str(finished / "onnx" / "model.onnx"))

    for name in ("model_quantized.onnx", "samples.npz"):
        (finished / "onnx" / name).unlink()
    node = onnx.helper.make_node
    save([node("Relu", ["pixel_values"], ["logits"])])
    results = {r.name: r for r in check_folder(finished, dims={"width": 7})}
    assert all(r.passed for r in results.values())
    assert "width 1, 3, 7" in results["onnx/model.onnx: sizes"].detail
    baked = np.array([0, 3, 7])
    save([node("Reshape", ["pixel_values", "shape"], ["logits"])], ("shape", baked))
    results = {r.name: r for r in check_folder(finished, dims={"width": 7})}
    assert not results["onnx/model.onnx: sizes"].passed
