"""Sessions, inputs and what a graph says about itself."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from slimfuse_export import (
    CheckFailed,
    ExportError,
    check_dims,
    check_graph,
    make_inputs,
    model_bytes,
    open_session,
    resize_batch,
    run_session,
)


@pytest.fixture
def text_model(tmp_path):
    """input_ids and attention_mask with a dynamic length, added and averaged."""
    names, shape = ("input_ids", "attention_mask"), ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        [
            helper.make_node("Add", list(names), ["sum"]),
            helper.make_node("Cast", ["sum"], ["logits"], to=TensorProto.FLOAT),
        ],
        "text",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in names],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
    )
    path = tmp_path / "text.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def test_a_session_is_pinned(write):
    one, two = (open_session(write(), threads=n).get_session_options() for n in (1, 2))
    assert (one.intra_op_num_threads, two.intra_op_num_threads) == (1, 2)
    assert one.inter_op_num_threads == two.inter_op_num_threads == 1
    assert two.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, "cut", None])
def test_a_missing_or_corrupt_file_is_a_clear_error(write, tmp_path, content):
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(write().read_bytes()[:999] if content == "cut" else content)
    with pytest.raises(ExportError, match=r"bad\.onnx") as caught:
        open_session(path, threads=1)
    assert caught.value.exit_code == 2
    with pytest.raises(ExportError, match=r"bad\.onnx"):
        check_graph(path)


def test_bad_settings_are_refused(write, tmp_path):
    with pytest.raises(ExportError, match="threads"):
        open_session(write(), threads=0)
    with pytest.raises(ExportError, match="optimisation"):
        open_session(write(), threads=1, optimization="most")
    with pytest.raises(ExportError, match="is a folder"):
        open_session(tmp_path, threads=1)


def test_all_gaps_of_a_call_are_told_at_once(write):
    session = open_session(write(), threads=1)
    with pytest.raises(ExportError) as caught:
        run_session(session, {"pixels": np.zeros(1)}, ["scores"])
    for part in ("missing inputs: pixel_values", "unknown inputs: pixels", "outputs: scores"):
        assert part in str(caught.value)
    with pytest.raises(CheckFailed, match="fails on these inputs"):
        run_session(session, {"pixel_values": np.zeros((2, 3, 8), np.float32)})


def test_inputs_fit_the_declared_shapes(text_model, write):
    inputs = make_inputs(open_session(text_model, threads=1), 3, dims={"sequence_length": 17})
    assert {name: a.shape for name, a in inputs.items()} == {
        "input_ids": (3, 17),
        "attention_mask": (3, 17),
    }
    assert set(np.unique(inputs["input_ids"])) == {0, 1}
    assert inputs["attention_mask"].all()
    session = open_session(write(), threads=1)
    first, again, other = (make_inputs(session, 5, seed=s)["pixel_values"] for s in (0, 0, 1))
    assert first.shape == (5, 3, 7)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_missing_sizes_and_fixed_batches_are_refused(text_model, write):
    with pytest.raises(
        ExportError, match=r"input_ids: dim 1 \(sequence_length\) has no size.*mask"
    ):
        make_inputs(open_session(text_model, threads=1), 3)
    with pytest.raises(ExportError, match="batch is fixed at 2, not 3"):
        make_inputs(open_session(write(batch=2), threads=1), 3)


def test_rows_are_repeated_in_order():
    rows = np.arange(6).reshape(3, 2)
    assert resize_batch({"x": rows}, 5)["x"].tolist() == rows[[0, 1, 2, 0, 1]].tolist()
    assert resize_batch({"x": rows}, 1)["x"].tolist() == rows[:1].tolist()


def test_named_dims_pass(write, text_model):
    assert check_dims(write()) == {
        "pixel_values": ("batch_size", 3, 7),
        "logits": ("batch_size", 5),
    }
    assert check_dims(text_model)["logits"] == ("batch_size", "sequence_length")


@pytest.mark.parametrize(
    "name", ["s18", "u0", "s18 + 1", "unk__3", "", "pixel_values_dynamic_axes_1", "?"]
)
def test_an_anonymous_dim_is_refused(write, name):
    with pytest.raises(CheckFailed, match=r"pixel_values: dim 0 is anonymous.*logits: dim 0"):
        check_dims(write(batch=name))


def test_a_fixed_batch_is_refused(write):
    with pytest.raises(CheckFailed, match="pixel_values: dim 0 is fixed at 4"):
        check_dims(write(batch=4))


def test_bytes_include_data_files(write, tmp_path):
    whole = write()
    assert model_bytes(whole) == whole.stat().st_size
    split, data = tmp_path / "split.onnx", tmp_path / "split.onnx_data"
    onnx.save(
        onnx.load(str(whole)),
        str(split),
        save_as_external_data=True,
        location=data.name,
        size_threshold=64,
    )
    assert data.stat().st_size > 0
    assert model_bytes(split) == split.stat().st_size + data.stat().st_size
