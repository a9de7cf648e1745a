"""Fixtures that several tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from known_exports import keep_exports, keep_registry
from longest import LONGEST
from sharing import once, session_folder
from tiny import random_vit
from tiny_run import save_parent, write_recipe
from torch import nn

from slimfuse import cli
from slimfuse.pipeline import Run, compress
from slimfuse.report import from_json
from slimfuse.stock import one_process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files (`--no-loadscope-reorder` keeps them first)."""
    place = {file: i for i, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.fixture
def vit() -> nn.Module:
    """A random float64 ViT."""
    return random_vit()


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `slimfuse ARGUMENTS` here; returns exit code, stdout and stderr."""

    def start(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slimfuse", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert isinstance(done.value.code, int)
        return done.value.code, *capsys.readouterr()

    return start


@pytest.fixture(scope="session", autouse=True)
def shared_process() -> Iterator[None]:
    """One clean process proves the folders of all runs: a start costs seconds."""
    with one_process():
        yield


@pytest.fixture(scope="session", autouse=True)
def known_exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whole runs export a model once, though tests repeat or interrupt them."""
    folder = session_folder(tmp_path_factory) / "exports"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        keep_exports(patch, folder)
        keep_registry(patch)
        yield


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of the tiny run."""
    recipes = once(tmp_path_factory, "recipes", lambda folder: write_recipe(folder / "tiny.yaml"))
    return recipes / "tiny.yaml"


@pytest.fixture(scope="session")
def finished(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The finished, undisturbed tiny run; tests only look at it."""
    folder = once(tmp_path_factory, "tiny", lambda folder: compress(tiny_recipe, out=folder))
    return Run(folder, folder / "model", from_json((folder / "report.json").read_text()))


@pytest.fixture(scope="session")
def saved_parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random parents `wide` (24 units) and `slim` (16 units)."""
    root = tmp_path_factory.mktemp("parents")
    save_parent(root / "wide", hidden_size=24, num_attention_heads=4, intermediate_size=32)
    save_parent(root / "slim", seed=1)
    return root
