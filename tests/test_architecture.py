"""Who may import whom (the design's "Who may import whom"), and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "slimfuse").rglob("*.py"))
EXPORT = sorted((ROOT / "export" / "slimfuse_export").rglob("*.py"))
MAX_LINES = 400
LONGER: set[str] = set()

# room -> the other rooms of slimfuse that it may import
ALLOWED = {
    "spaces": set(),
    "transport": set(),
    "families": {"spaces", "errors"},
    "moments": {"spaces", "errors"},
    "saliency": {"batch", "errors", "families", "moments", "progress", "spaces", "transport"},
    "shapes": {"families", "errors"},
    "batch": set(),
    "nets": {"spaces", "transport", "moments", "errors"},
    "fuse": {
        "batch",
        "spaces",
        "transport",
        "moments",
        "families",
        "saliency",
        "progress",
        "errors",
    },
}
# room -> the rooms that it must not know
FORBIDDEN = {
    room: {"spaces", "transport", "families", "fuse", "recipe"}
    for room in ("finetune", "onnx", "report", "store")
}
RECIPE_READERS = {"recipe", "pipeline", "cli"}
# what a user calls: commands and the public names; only these may use the pipeline
FRONT = {"__init__", "__main__", "cli", "doctor", "stock", "verify"}


def imports(source: str, package: str) -> set[str]:
    """Return the dotted names that a file of `package` imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / "slimfuse").parts[0].removesuffix(".py")


def rooms_used(file: Path) -> set[str]:
    """Return what a file imports from slimfuse, by room; its own left out."""
    package = ".".join(file.relative_to(ROOT).parent.parts)
    names = imports(file.read_text(encoding="utf-8"), package)
    rooms = {n.split(".")[1] for n in names if n.startswith("slimfuse.")}
    return rooms - {room_of(file), "__version__"}


def path(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_imports_are_seen_in_every_form() -> None:
    source = """
import slimfuse.spaces.atlas as a, os
from slimfuse import recipe
from slimfuse.fuse.refit import refit
from .walk import x
from .. import moments
from ..transport import solve
def later():
    from slimfuse.onnx import export_onnx
if TYPE_CHECKING:
    import torch.nn
"""
    assert imports(source, "slimfuse.fuse") == {
        "slimfuse.spaces.atlas", "os", "slimfuse.recipe", "slimfuse.fuse.refit.refit",
        "slimfuse.fuse.walk.x", "slimfuse.moments", "slimfuse.transport.solve",
        "slimfuse.onnx.export_onnx", "torch.nn",
    }  # fmt: skip


def test_every_named_room_exists() -> None:
    existing = {room_of(f) for f in SOURCES}
    assert {*ALLOWED, *FORBIDDEN, *RECIPE_READERS} <= existing
    assert len(EXPORT) > 5


@pytest.mark.parametrize("file", SOURCES, ids=path)
def test_a_file_imports_only_what_its_room_may(file: Path) -> None:
    room, used = room_of(file), rooms_used(file)
    if room in ALLOWED:
        assert used <= ALLOWED[room], f"{room} may not import {sorted(used - ALLOWED[room])}"
    if room in FORBIDDEN:
        assert not used & FORBIDDEN[room], f"{room} must not know {used & FORBIDDEN[room]}"
    if room not in RECIPE_READERS:
        assert "recipe" not in used, "only the pipeline and the command line read recipes"
    if room not in FRONT | {"pipeline"}:
        # public verbs (`from slimfuse import compress`) are the pipeline by another name
        assert used <= {room_of(f) for f in SOURCES} - FRONT - {"pipeline"}, (
            "rooms don't know who uses them"
        )


@pytest.mark.parametrize("file", EXPORT, ids=path)
def test_the_export_distribution_stands_alone(file: Path) -> None:
    names = imports(file.read_text(encoding="utf-8"), "slimfuse_export")
    assert not {n.split(".")[0] for n in names} & {"slimfuse", "torch", "transformers"}


FAMILY_FILES = [f for f in SOURCES if f.parent.name == "families" and f.stem != "__init__"]


@pytest.mark.parametrize("file", FAMILY_FILES, ids=path)
def test_a_family_imports_no_other_family(file: Path) -> None:
    names = imports(file.read_text(encoding="utf-8"), "slimfuse.families")
    inner = {n.split(".")[2] for n in names if n.startswith("slimfuse.families.")}
    shared = {"base", "hf", "encoder", "endings", "decoder", "working", "adopting"}
    if file.stem.startswith("timm"):  # one family in several files, which reads stock ViTs, too
        shared |= {"timm_model", "timm_stock", "timm_vit"}
    assert inner <= shared


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("file", [*SOURCES, *EXPORT], ids=path)
def test_no_source_file_is_over_400_lines(file: Path) -> None:
    if path(file) not in LONGER:
        assert lines(file) <= MAX_LINES


def test_the_exceptions_are_really_over() -> None:
    for name in LONGER:
        assert lines(ROOT / name) > MAX_LINES, f"{name} needs no exception any more"
