"""Folders that are broken or mean harm: one error, code 2 or 3, nothing read or written outside."""

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from slimfuse_export.cli import main

MODEL, SAMPLES = "onnx/model.onnx", "onnx/samples.npz"


@pytest.fixture
def refused(finished, capsys):
    """Run a verb on the spoiled folder; it must end with 2 or 3 and one error, and write nothing"""
    root = finished.parent.parent

    def listing():
        return {p: p.stat().st_size for p in root.rglob("*") if p.is_file()}

    def run(verb, *words):
        before = listing()
        with pytest.raises(SystemExit) as caught:
            main([verb, str(finished), *words])
        out, err = capsys.readouterr()
        assert caught.value.code in (2, 3), (caught.value.code, err)
        assert err and "Traceback" not in out + err and len(err) < 4000
        assert listing() == before
        return out + err

    return run


def edit(folder, change):
    """Change the ONNX graph of a folder."""
    model = onnx.load(str(folder / MODEL))
    change(model.graph)
    (folder / MODEL).write_bytes(model.SerializeToString())


def elsewhere(location, **more):
    """Return a change that says a weight's data lie in another file."""

    def change(graph):
        weight = graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            weight.external_data.add(key=key, value=value)

    return change


def dims(*sizes):
    def change(graph):
        del graph.initializer[0].dims[:]
        graph.initializer[0].dims.extend(sizes)

    return change


GRAPHS = {
    "data above": elsewhere("../secret.bin"),
    "data at the root": elsewhere("/etc/hostname"),
    "data gone": elsewhere("gone.bin"),
    "data in itself": elsewhere("model.onnx", offset="0", length="1"),
    "data far": elsewhere("weights.bin", offset=str(2**62), length=str(2**62)),
    "data before": elsewhere("weights.bin", offset="-8"),
    "no numbers": elsewhere("weights.bin", offset="a", length="b"),
    "giant": dims(2**40, 2**40),
    "negative": dims(-21, 34),
    "other dims": dims(3, 3),
    "unknown type": lambda g: setattr(g.initializer[0], "data_type", 999),
    "unknown operator": lambda g: setattr(g.node[1], "op_type", "Nothing"),
    "other domain": lambda g: setattr(g.node[1], "domain", "evil.example"),
    "a circle": lambda g: g.node[1].input.__setitem__(0, "logits"),
    "no output": lambda g: g.ClearField("output"),
    "no nodes": lambda g: g.ClearField("node"),
    "text as input": lambda g: setattr(
        g.input[0].type.tensor_type, "elem_type", TensorProto.STRING
    ),
    "a giant of zeros": lambda g: g.node.insert(
        0, helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    ),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_that_is_wrong_fails_the_check(finished, refused, case):
    (finished.parent.parent / "secret.bin").write_bytes(b"\0" * 4096)
    (finished / "onnx" / "weights.bin").write_bytes(b"\0" * 4096)
    edit(finished, GRAPHS[case])
    refused("check")


@pytest.mark.parametrize("case", ["data above", "data at the root", "giant", "unknown type"])
def test_a_graph_that_is_wrong_is_not_used(finished, capsys, case):
    (finished.parent.parent / "secret.bin").write_bytes(b"\0" * 4096)
    edit(finished, GRAPHS[case])
    for verb, *words in (["inspect"], ["predict", "x"], ["bench"], ["quantize"]):
        with pytest.raises(SystemExit) as caught:
            main([verb, str(finished), *words])
        err = capsys.readouterr().err
        assert caught.value.code in (2, 3), (verb, err)
        assert err and "Traceback" not in err


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_model_that_is_cut_off_fails(finished, refused, share):
    raw = (finished / MODEL).read_bytes()
    (finished / MODEL).write_bytes(raw[: int(share * len(raw))])
    refused("check")


@pytest.mark.parametrize("seed", range(6))
def test_a_model_with_other_bytes_ends_well(finished, capsys, seed):
    chance = random.Random(seed)
    raw = bytearray((finished / MODEL).read_bytes())
    for _ in range(chance.choice((1, 10, 100))):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    (finished / MODEL).write_bytes(raw)
    for verb in ("inspect", "check"):
        with pytest.raises(SystemExit) as caught:
            main([verb, str(finished)])
        assert caught.value.code in (0, 2, 3), capsys.readouterr().err
        assert "Traceback" not in capsys.readouterr().err


def archive(**arrays):
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    return raw.getvalue()


def zipped(**texts):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        for name, text in texts.items():
            file.writestr(name, text)
    return raw.getvalue()


NPY = b"\x93NUMPY\x01\x00v\x00"
ARCHIVES = {
    "empty": b"",
    "no zip": b"garbage" * 9,
    "no arrays": archive(),
    "others": archive(x=np.ones(3)),
    "pickled": archive(**{"0/input/pixel_values": np.array([{"a": 1}], object)}),
    "a pickle": zipped(**{"0/input/pixel_values.npy": b"\x80\x04\x95cos\nsystem\n."}),
    "paths": zipped(**{"../../evil.npy": b"x", "/evil.npy": b"x"}),
    "giant": zipped(**{"0/input/pixel_values.npy": NPY
                       + b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387,)}"
                       .ljust(117) + b"\n"}),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_samples_that_are_none_fail(finished, refused, case):
    (finished / SAMPLES).write_bytes(ARCHIVES[case])
    refused("check")


@pytest.mark.parametrize("value", [None, [], 7, "x", {"architectures": 3}, {"model_type": [1]}])
@pytest.mark.parametrize("verb", ["check", "predict"])
def test_a_config_that_is_nonsense_ends_well(finished, capsys, verb, value):
    (finished / "config.json").write_text(json.dumps(value))
    with pytest.raises(SystemExit) as caught:
        main([verb, str(finished), *(["x"] if verb == "predict" else [])])
    out, err = capsys.readouterr()
    assert caught.value.code in (0, 2, 3), err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', '{"model": {"type": "x"}}', "\0"])
def test_a_tokenizer_that_is_nonsense_is_one_error(finished, refused, text):
    (finished / "tokenizer.json").write_text(text)
    (finished / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("predict", "a text")


def test_a_link_in_a_circle_and_a_folder_for_a_model(finished, refused):
    (finished / MODEL).unlink()
    (finished / MODEL).symlink_to(Path(MODEL).name)
    refused("check")
    (finished / MODEL).unlink()
    (finished / MODEL).mkdir()
    refused("check")
