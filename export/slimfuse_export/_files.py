"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimfuse_export.errors import ExportError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` that takes its place when the block ends well.

    The suffix is kept, because numpy and onnx choose the format by it. On any exception the
    temporary file is removed and `target` stays as it was.
    Raises: ExportError where the folder doesn't exist.
    """
    if not target.parent.is_dir():
        raise ExportError("the folder to write into does not exist", where=target.parent)
    part = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
    try:
        yield part
        with part.open("rb") as handle:
            os.fsync(handle.fileno())  # a crash after the rename must not leave an empty file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
