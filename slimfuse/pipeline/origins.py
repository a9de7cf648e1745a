"""Where a recipe's models come from: folders, installed packages, the hub."""

from __future__ import annotations

from pathlib import Path

from slimfuse.data.packages import PACKAGE, find_package
from slimfuse.errors import ParentError, first_line
from slimfuse.tasks import Task


def find_parent(
    name: str,
    origin: str,
    revision: str | None,
    beside: Path,
    task: Task,
    *,
    where: str | None = None,
) -> Path:
    """Return the local folder of a parent, fetching a hub id once; raises ParentError.

    where: the recipe's place that holds `from`. `package:NAME` is an installed Python package.
    """
    key = "from" if where is None or "train" not in where else "start"
    where = where or f"parents.{name}"
    if origin.startswith(PACKAGE):
        folder = find_package(origin, where=f"{where}.{key}")
        _need_files(name, folder, task)
        return folder
    given = Path(origin).expanduser()
    for folder in (beside / given, given):
        if folder.is_dir():
            if revision is not None:
                raise ParentError(
                    "a revision goes only with a hub id, and this is a folder here",
                    where=f"{where}.revision",
                    got=revision,
                    hint="remove the key",
                )
            _need_files(name, folder, task)
            return folder
    hint = f"give a folder with config.json, model.safetensors, {', '.join(task.files)}"
    looks_local = origin.startswith((".", "/", "~")) or origin.count("/") != 1
    top = Path(given.parts[0])
    if not looks_local and ((beside / top).is_dir() or top.is_dir()):
        looks_local = True  # a mistyped path rather than a hub id
        hint = f"the folder {top} is here, but {given.name} is not in it; {hint}"
    if looks_local:
        raise ParentError(
            f"parent {name!r} does not exist", where=f"{where}.{key}", got=origin, hint=hint
        )
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(
            origin, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt"]
        )
    except Exception as error:
        raise ParentError(
            f"parent {name!r} is neither a folder here nor to be had from the hub",
            where=f"{where}.{key}",
            got=f"{origin} ({first_line(error)})",
            hint=f"{hint}, or a hub id while online",
        ) from error
    _need_files(name, Path(fetched), task)
    return Path(fetched)


def _need_files(name: str, folder: Path, task: Task) -> None:
    needed = ("config.json", "model.safetensors", *task.files)
    missing = [f for f in needed if not (folder / f).is_file()]
    if missing:
        pickled = (
            "pytorch_model.bin is not read: " if (folder / "pytorch_model.bin").is_file() else ""
        )
        raise ParentError(
            f"parent {name!r} lacks {', '.join(missing)}",
            where=str(folder),
            hint=f"{pickled}save the model and its {task.preprocessor} with save_pretrained",
        )
