"""Folders that need not hold a whole model: a tokenizer's, or those of a config alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimfuse.data.packages import PACKAGE, find_package
from slimfuse.errors import ParentError, first_line

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CONFIG = ("config.json",)


def find_folder(
    origin: str, beside: Path, files: Sequence[str], *, where: str, revision: str | None = None
) -> Path:
    """Return the local folder with these files; of a hub id nothing but them is fetched.

    origin: a folder, beside the recipe or below the current one, a hub id or `package:NAME`.
    Raises ParentError at the recipe's key `where`.
    """
    if origin.startswith(PACKAGE):
        folder = find_package(origin, where=where)
    else:
        given = Path(origin).expanduser()
        local = next((path for path in (beside / given, given) if path.is_dir()), None)
        folder = local or _fetched(origin, files, where, revision)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ParentError(f"the folder lacks {', '.join(missing)}", where=where, got=origin)
    return folder


def _fetched(origin: str, files: Sequence[str], where: str, revision: str | None) -> Path:
    """Return the cached files of a hub id, fetched once."""
    hint = f"give a folder with {', '.join(files)}, or a hub id while online"
    if origin.startswith((".", "/", "~")) or origin.count("/") != 1:
        raise ParentError("there is no such folder", where=where, got=origin, hint=hint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(origin, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        raise ParentError(
            "this is neither a folder here nor to be had from the hub",
            where=where,
            got=f"{origin} ({first_line(error)})",
            hint=hint,
        ) from error
