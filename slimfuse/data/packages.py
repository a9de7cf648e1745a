"""Models that installed Python packages ship."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path, PurePosixPath

from slimfuse.errors import ParentError

PACKAGE = "package:"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def find_package(origin: str, *, where: str | None = None) -> Path:
    """Return the folder with a model that `package:NAME` or `package:NAME/FOLDER` names.

    A model is config.json with its weights, or a GGUF file. NAME is an installed distribution;
    FOLDER is counted from where packages are installed, and is needed only where several folders
    of the distribution hold a model. Nothing of the package is imported. where: the recipe's key,
    for errors. Raises ParentError.
    """
    name, _, folder = origin.removeprefix(PACKAGE).partition("/")
    wanted = PurePosixPath(folder)
    safe = not (wanted.is_absolute() or ".." in wanted.parts or "\\" in folder)
    if not (_NAME.fullmatch(name) and safe):
        raise ParentError(
            "a package's model is named otherwise",
            where=where,
            got=origin,
            allowed=f"{PACKAGE}NAME, or {PACKAGE}NAME/FOLDER with a folder inside the package",
        )
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ParentError(
            f"package {name!r} is not installed",
            where=where,
            got=origin,
            hint=f"pip install --no-deps {name}",
        ) from error
    # what an installer puts elsewhere (`../../bin`) is listed, too
    files = [f for f in distribution.files or () if not f.is_absolute() and ".." not in f.parts]
    marks = [f for f in files if f.name == "config.json" or f.suffix == ".gguf"]
    models = {f.parent for f in marks if Path(f.locate()).is_file()}
    weights = {f.parent for f in files if f.suffix in (".safetensors", ".gguf")}
    # beside a model there may be configs of other things, such as pooling
    found = models & ({wanted} if folder else weights) or (set() if folder else models)
    if len(found) != 1:
        raise ParentError(
            f"package {name!r} holds {'several models' if found else 'no model there'}",
            where=where,
            got=origin,
            allowed=", ".join(sorted(f"{PACKAGE}{name}/{m}" for m in found or models)) or None,
            hint="name one of these" if models else "config.json or .gguf marks a model's folder",
        )
    return Path(str(distribution.locate_file(found.pop())))
