"""The distribution stands alone."""

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
    assert "slimfuse_export.bench" in names
    code = (
        f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'slimfuse'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
