"""What other servers read, read back as they do: by protobuf's, YAML's and zip's own parsers."""

import zipfile
from pathlib import Path

import deployed_folders as folders
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from ruamel.yaml import YAML
from slimfuse_export import ExportError
from slimfuse_export.cli import main
from slimfuse_export.packaging import write_kserve, write_triton, write_zip

FIELD = descriptor_pb2.FieldDescriptorProto


def message(file, name, *fields):
    """Add a message with (name, number, type, repeated) fields; a type by name is a message."""
    made = file.message_type.add(name=name)
    for key, number, kind, repeated in fields:
        label = FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL
        if isinstance(kind, str):
            which = FIELD.TYPE_ENUM if kind in ("DataType", "Kind") else FIELD.TYPE_MESSAGE
            made.field.add(name=key, number=number, type=which, type_name=f".t.{kind}", label=label)
        else:
            made.field.add(name=key, number=number, type=kind, label=label)


def model_config():
    """Triton's ModelConfig as far as we write it, numbered as in its model_config.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto3")
    types = ("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32",
             "INT64", "FP16", "FP32", "FP64")  # fmt: skip
    for name, values in (
        ("DataType", [f"TYPE_{t}" for t in types]),
        ("Kind", ["KIND_AUTO", "KIND_GPU", "KIND_CPU"]),
    ):
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    text, whole = FIELD.TYPE_STRING, FIELD.TYPE_INT64
    message(file, "Input", ("name", 1, text, 0), ("data_type", 2, "DataType", 0),
            ("dims", 4, whole, 1))  # fmt: skip
    message(file, "Output", ("name", 1, text, 0), ("data_type", 2, "DataType", 0),
            ("dims", 3, whole, 1), ("label_filename", 4, text, 0))  # fmt: skip
    message(file, "Batching", ("max_queue_delay_microseconds", 2, FIELD.TYPE_UINT64, 0))
    message(file, "Group", ("count", 2, FIELD.TYPE_INT32, 0), ("kind", 4, "Kind", 0))
    message(file, "ModelConfig", ("name", 1, text, 0), ("backend", 17, text, 0),
            ("max_batch_size", 4, FIELD.TYPE_INT32, 0), ("input", 5, "Input", 1),
            ("output", 6, "Output", 1), ("dynamic_batching", 11, "Batching", 0),
            ("instance_group", 7, "Group", 1))  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))()


def check_repository(model: Path) -> None:
    """Hold a repository's config against the graph beside it."""
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config())
    assert config.name == model.name
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    named = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    for declared, real in (
        (config.input, session.get_inputs()), (config.output, session.get_outputs()),
    ):  # fmt: skip
        assert [
            (value.name, named[value.data_type].name, list(value.dims)) for value in declared
        ] == [
            (value.name, types[value.type],
             [dim if isinstance(dim, int) else -1 for dim in value.shape[1:]])
            for value in real
        ]  # fmt: skip
    assert config.max_batch_size > 0
    assert config.HasField("dynamic_batching")


def test_a_triton_repository_says_what_the_graph_says(tmp_path):
    folder = folders.colours(tmp_path / "Run no. 1" / "model")
    model = write_triton(folder, tmp_path / "repository", max_batch=8, wait_ms=1.5)
    assert model == tmp_path / "repository" / "run-no-1"
    check_repository(model)
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config())
    assert (config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds) == (
        8,
        1500,
    )
    assert config.output[0].label_filename == "labels.txt"
    assert (model / "labels.txt").read_text().split() == list(folders.COLOURS)
    source = folder / "onnx" / "model.onnx"
    assert (model / "1" / "model.onnx").read_bytes() == source.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Run no. 1", "repository"]


@pytest.mark.parametrize("task", ["BertModel", "GPT2LMHeadModel"])
def test_texts_have_dynamic_lengths(tmp_path, task):
    folder = folders.states(tmp_path / "texts", task)
    model = write_triton(folder, tmp_path / "out")
    check_repository(model)
    assert not (model / "labels.txt").exists()


def test_weights_beside_the_graph_come_along(tmp_path):
    import onnx

    folder = folders.states(tmp_path / "model", "BertModel")
    path = folder / "onnx" / "model.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data",
              size_threshold=0)  # fmt: skip
    check_repository(write_triton(folder, tmp_path / "out", name="x"))


def test_kserve_gets_a_service_and_its_repository(tmp_path):
    folder = folders.sorts(tmp_path / "model")
    file = write_kserve(folder, tmp_path / "out", storage_uri="pvc://models/x: y", name="sorts")
    told = YAML(typ="safe").load(file)
    assert (told["kind"], told["metadata"]["name"]) == ("InferenceService", "sorts")
    model = told["spec"]["predictor"]["model"]
    assert model["modelFormat"]["name"] == "onnx"
    assert (model["protocolVersion"], model["storageUri"]) == ("v2", "pvc://models/x: y")
    assert model["resources"]["requests"] == {"cpu": "2", "memory": "512Mi"}
    check_repository(tmp_path / "out" / "models" / "sorts")


def test_a_zip_is_the_same_wherever_it_is_made(tmp_path):
    folder = folders.colours(tmp_path / "a")
    (folder / ".hidden.part").write_text("left out")
    other = tmp_path / "b"
    other.mkdir()
    for path in sorted(folder.rglob("*"), reverse=True):  # another order, other times and modes
        copy = other / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            copy.write_bytes(path.read_bytes())
            copy.chmod(0o600)
    names = write_zip(folder, tmp_path / "a.zip")
    write_zip(other, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert names == ["config.json", "onnx/model.onnx", "preprocessor_config.json"]
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert packed.testzip() is None
        packed.extractall(tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    folder = folders.colours(tmp_path / "model")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    with pytest.raises(ExportError, match="something already"):
        write_triton(folder, full)
    with pytest.raises(ExportError, match="name is not legal"):
        write_triton(folder, tmp_path / "x", name="Not Legal")
    with pytest.raises(ExportError, match="can't fetch"):
        write_kserve(folder, tmp_path / "x", storage_uri="file:///x")
    with pytest.raises(ExportError, match="name is not legal"):
        write_kserve(folder, tmp_path / "x", storage_uri="pvc://x", name="-")
    with pytest.raises(ExportError, match="inside of the folder"):
        write_zip(folder, folder / "x.zip")
    with pytest.raises(ExportError, match="no model"):
        write_zip(full, tmp_path / "x.zip")
    (folder / "link").symlink_to(full / "mine")
    with pytest.raises(ExportError, match="leads out"):
        write_zip(folder, tmp_path / "x.zip")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "model"]


def test_a_fixed_batch_is_refused(tmp_path):
    import onnx

    folder = folders.colours(tmp_path / "model")
    path = folder / "onnx" / "model.onnx"
    graph = onnx.load(path)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(graph, path)
    with pytest.raises(ExportError, match="batch is fixed"):
        write_triton(folder, tmp_path / "out")


def test_the_verb_writes_each_layout(tmp_path, capsys):
    folder = str(folders.colours(tmp_path / "model"))
    for words, code, said in (
        (["--format", "triton", "--out", str(tmp_path / "t"), "--name", "x"], 0, "/t/x"),
        (["--format", "zip", "--out", str(tmp_path / "z.zip")], 0, "3 files"),
        (["--format", "kserve", "--out", str(tmp_path / "k")], 2, "--storage-uri"),
        (
            ["--format", "kserve", "--out", str(tmp_path / "k"), "--storage-uri", "s3://b/m"],
            0,
            "yaml",
        ),
        (["--format", "tar", "--out", str(tmp_path / "x")], 2, "tar"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["package", folder, *words])
        assert caught.value.code == code
        assert said in "".join(capsys.readouterr())


def test_the_parser_refuses_what_triton_would():
    with pytest.raises(text_format.ParseError):
        text_format.Parse('name: "x" max_batchsize: 3', model_config())
