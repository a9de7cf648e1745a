"""The distribution stands alone."""

import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import slimfuse_export
from slimfuse_export import CheckFailed, ExportError


def test_no_module_imports_torch_transformers_or_slimfuse():
    names = ["onnxruntime.quantization"]  # imported late, so named here
    names += [m.name for m in pkgutil.walk_packages(slimfuse_export.__path__, "slimfuse_export.")]
    for part in ("bench", "deployed.model", "serving.server", "packaging.triton", "cli.using"):
        assert f"slimfuse_export.{part}" in names
    code = (
        f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'slimfuse'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_service_is_an_extra():
    code = (
        "import slimfuse_export.cli, slimfuse_export.deployed, sys; print('fastapi' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_container_is_no_root_and_asks_whether_it_is_ready():
    lines = (Path(__file__).parents[1] / "Dockerfile").read_text().splitlines()
    words = [line.split()[0] for line in lines if line[:1].isupper()]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert not any(line.startswith("USER root") for line in lines)
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    asked = next(line for line in lines if line.startswith("CMD"))
    verb, folder, *options = [*json.loads(entry[10:])[1:], *json.loads(asked[3:])]
    assert (verb, folder) == ("serve", "/model")
    known = subprocess.run(
        [sys.executable, "-m", "slimfuse_export", "serve", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    ).stdout  # fmt: skip
    assert all(option in known for option in options if option.startswith("--"))
    assert any("/ready" in line for line in lines)


def test_version_is_that_of_the_distribution():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert slimfuse_export.__version__ == project["version"]


def test_every_public_name_exists_once_and_is_documented():
    assert sorted(set(slimfuse_export.__all__)) == list(slimfuse_export.__all__)
    assert all(getattr(slimfuse_export, name).__doc__ for name in slimfuse_export.__all__)


def test_an_error_says_everything_in_one_message():
    error = CheckFailed("it broke", where="a.onnx", got=0, allowed="1", hint="try again")
    assert isinstance(error, ExportError)
    assert (ExportError.exit_code, CheckFailed.exit_code) == (2, 3)
    assert str(error).splitlines() == [
        "it broke",
        "  where:   a.onnx",
        "  got:     0",
        "  allowed: 1",
        "  next:    try again",
    ]
    assert str(ExportError("only this")) == "only this"
