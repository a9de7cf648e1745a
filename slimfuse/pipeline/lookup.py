"""Where something is that a recipe names: a folder here, an installed package, a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimfuse.data.gguf import SUFFIX
from slimfuse.data.packages import PACKAGE, find_package
from slimfuse.errors import ParentError, first_line

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CONFIG = ("config.json",)


def find_folder(
    origin: str, beside: Path, files: Sequence[str], *, where: str, revision: str | None = None
) -> Path:
    """Return the local folder with these files; of a hub id nothing but them is fetched.

    For a folder that need not hold a whole model: a tokenizer's, or that of a config alone.
    origin: a folder, beside the recipe or below the current one, a hub id or `package:NAME`.
    Raises ParentError at the recipe's key `where`.
    """
    if origin.startswith(PACKAGE):
        folder = find_package(origin, where=where)
    else:
        hint = f"give a folder with {', '.join(files)}, or a hub id while online"
        folder = find_here(origin, beside) or fetch(
            origin, beside, files, what="the folder", where=where, hint=hint, revision=revision
        )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ParentError(f"the folder lacks {', '.join(missing)}", where=where, got=origin)
    return folder


def find_here(origin: str, beside: Path) -> Path | None:
    """Return the folder or GGUF file, beside the recipe or below the current folder, if any."""
    given = Path(origin).expanduser()
    for path in (beside / given, given):
        if path.is_dir() or (path.suffix == SUFFIX and path.is_file()):
            return path
    return None


def fetch(
    origin: str,
    beside: Path,
    files: Sequence[str],
    *,
    what: str,
    where: str,
    hint: str,
    revision: str | None = None,
) -> Path:
    """Return the cached files (patterns) of a hub id, fetched once.

    what: what is looked for, and hint: what to give in its place, for messages. Raises ParentError
    at the recipe's key `where`, also for what looks like a mistyped path.
    """
    given = Path(origin).expanduser()
    top = Path(given.parts[0])
    is_path = origin.startswith((".", "/", "~")) or origin.count("/") != 1
    if not is_path and ((beside / top).is_dir() or top.is_dir()):
        is_path = True
        hint = f"the folder {top} is here, but {given.name} is not in it; {hint}"
    if is_path or given.suffix == SUFFIX:
        raise ParentError(f"{what} does not exist", where=where, got=origin, hint=hint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(origin, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        raise ParentError(
            f"{what} is neither a folder here nor to be had from the hub",
            where=where,
            got=f"{origin} ({first_line(error)})",
            hint=hint,
        ) from error
