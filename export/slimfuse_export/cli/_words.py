"""What the user's words mean: sizes of dims, lists of numbers, models and their names."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from slimfuse_export.errors import ExportError
from slimfuse_export.folder import INT8, MODEL, OPTIMIZED

Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="Size of a dynamic dim, but for the batch."),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as one JSON document; what people read goes to stderr."
    ),
]


def screen(as_json: bool) -> Console:
    """Return where people read: stdout, or stderr where that is kept for JSON."""
    return Console(stderr=as_json)


def give(result: Any, as_json: bool) -> None:
    """Print a result as one JSON document on stdout, where it is asked for; UTF-8 everywhere."""
    if as_json:
        text = json.dumps(result, ensure_ascii=False, indent=2)
        sys.stdout.buffer.write(f"{text}\n".encode("utf-8", "replace"))
        sys.stdout.flush()


def name_models(paths: Sequence[Path]) -> dict[str, Path]:
    """Name each model by as few trailing parts of its path as tell all of them apart.

    `x/model/onnx/model.onnx` is `model`, its quantised sibling `model/int8`; were there another
    folder called `model`, they would be `x/model` and `y/model`. No name is an absolute path.
    Raises: ExportError where a file is given twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = sorted({str(path) for path in paths if resolved.count(path.resolve()) > 1})
        raise ExportError("a model is given twice", got=twice)
    if not paths:
        raise ExportError("no model is given", allowed="model folders or .onnx files")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = [_name(path, depth) for path in resolved]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    raise AssertionError("distinct paths have distinct names at full depth")


def _name(path: Path, depth: int) -> str:
    ends = {MODEL.parts: (), INT8.parts: ("int8",), OPTIMIZED.parts: ("optimized",)}
    tail = ends.get(path.parts[-2:])
    root, tail = (path.with_suffix(""), ()) if tail is None else (path.parent.parent, tail)
    return "/".join((*root.parts[1:][-depth:], *tail))


def model_files(path: Path) -> list[Path]:
    """Return the ONNX files of a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    found = [path / model for model in (MODEL, OPTIMIZED, INT8) if (path / model).is_file()]
    if not found:
        raise ExportError("the folder holds no model", where=path, allowed=f"{MODEL} or {INT8}")
    return found


def numbers(option: str, text: str) -> list[int]:
    """Return the numbers of a list as 1,2,4."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ExportError(
            "not a list of whole numbers", where=option, got=text, allowed="as 1,2,4"
        ) from error


def sizes(words: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Return the sizes of dims, each as NAME=SIZE or NAME=SIZE,SIZE."""
    found: dict[str, tuple[int, ...]] = {}
    for word in words or ():
        name, _, text = word.partition("=")
        given = text.split(",")
        if not name or not all(size.isdecimal() and int(size) >= 1 for size in given):
            allowed = "NAME=SIZE or NAME=SIZE,SIZE"
            raise ExportError("not a dim's size", where="--dim", got=word, allowed=allowed)
        found[name] = tuple(int(size) for size in given)
    return found


def single_sizes(words: Sequence[str] | None) -> dict[str, int]:
    """Return the sizes of dims where each has one."""
    found = sizes(words)
    if several := [name for name, given in found.items() if len(given) > 1]:
        raise ExportError("one size for each dim, please", where="--dim", got=", ".join(several))
    return {name: given[0] for name, given in found.items()}
