"""A zip whose bytes depend on the files alone."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from slimfuse_export._files import replacing
from slimfuse_export.errors import ExportError
from slimfuse_export.folder import MODEL

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


def write_zip(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Write a folder's files into a zip, which appears whole or not at all; return their names.

    Names stand in order, times and owners are left out and nothing is compressed (weights hardly
    shrink), so equal folders give equal bytes on any machine. Hidden files are left out.
    Raises: ExportError where the folder holds no model, or a link leads out of it.
    """
    folder, target = Path(folder), Path(target)
    if not (folder / MODEL).is_file():
        raise ExportError("the folder holds no model", where=folder, allowed=MODEL.as_posix())
    if target.resolve().is_relative_to(folder.resolve()):
        raise ExportError("the package would lie inside of the folder", where=target)
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }
    outside = [
        name for name, path in found.items()
        if not path.resolve().is_relative_to(folder.resolve())
    ]  # fmt: skip
    if outside:
        raise ExportError("a link leads out of the folder", where=folder, got=sorted(outside))
    with replacing(target) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as packed:
        for name in sorted(found):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix, wherever made
            with found[name].open("rb") as source, packed.open(entry, "w", force_zip64=True) as to:
                while block := source.read(1 << 20):
                    to.write(block)
    return sorted(found)
