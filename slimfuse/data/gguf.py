"""GGUF files as ordinary model folders: read once by transformers, kept as safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimfuse.data import cache
from slimfuse.errors import ParentError, first_line
from slimfuse.progress import working

SUFFIX = ".gguf"
LICENCE_KEYS = ("general.license", "general.license.name", "general.license.link")


def find_gguf(path: Path) -> Path | None:
    """Return a GGUF file: `path` itself, or the only one in a folder that has no config.json."""
    if path.is_file() and path.suffix == SUFFIX:
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    return files[0] if len(files) == 1 else None


def converted(file: Path, types: Collection[str], *, where: str | None = None) -> Path:
    """Return a folder in the user's cache with a GGUF file's model, config and tokenizer.

    It is named by the file's sha256 and made once. types: the architectures that are taken, as
    GGUF names them; where: the recipe's key, for errors. Raises ParentError.
    """
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    target = cache.cache_folder("gguf") / digest[:32]
    if target.is_dir():
        return target
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise ParentError(
            "GGUF files can't be read here",
            where=where,
            got=f"{file.name}, without the Python package {' and '.join(missing)}",
            hint='pip install "slimfuse[gguf]"',
        )
    with working(f"converting {file.name}, once"):
        return cache.fill(target, lambda folder: convert(file, folder, types, where=where))


def convert(file: Path, folder: Path, types: Collection[str], *, where: str | None = None) -> None:
    """Write a GGUF file's model (float32), config, tokenizer and licence into a folder.

    Weights that were rounded stay so: nothing is lost or won. Raises ParentError for a model of
    none of `types` and for a file that transformers can't read.
    """
    from transformers import AutoConfig, AutoTokenizer

    told = _told(file, where)
    kind = told.get("general.architecture")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if kind not in types:
        raise ParentError(
            "the GGUF file holds a model of another family",
            where=where,
            got=str(kind),
            allowed=", ".join(sorted(types)),
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(**source)
            _save_model(config, source, folder)
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ParentError(
            "the GGUF file can't be converted", where=where, got=f"{file.name}: {first_line(error)}"
        ) from error
    licence, name, link = (told.get(key) for key in LICENCE_KEYS)
    if licence is not None:
        keys = {"license": licence, "license_name": name, "license_link": link}
        lines = [f"{key}: {json.dumps(value)}" for key, value in keys.items() if value is not None]
        text = "\n".join(["---", *lines, "---", "", f"Converted from {file.name}.", ""])
        (folder / "README.md").write_text(text, encoding="utf-8")


def _save_model(config: Any, source: dict[str, str], folder: Path) -> None:
    """Write the weights through a new model: the class refuses to save what it read from GGUF."""
    import torch
    from transformers import AutoModelForCausalLM

    read, info = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: sorted(found)[:5] for key, found in info.items() if found}
    if wrong:
        raise ValueError("; ".join(f"{key}: {found}" for key, found in wrong.items()))
    model, info = type(read).from_pretrained(
        None, config=config, state_dict=read.state_dict(), output_loading_info=True
    )
    assert not any(info.values()), info
    model.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's own bars; ours tells what is going on."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _told(file: Path, where: str | None) -> dict[str, Any]:
    """Return what a GGUF file says of its architecture and its licence."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ParentError(
            "the GGUF file can't be read",
            where=where,
            got=f"{file.name}: {first_line(error)}",
            hint="the file may be cut off: fetch it again",
        ) from error
    wanted = ("general.architecture", *LICENCE_KEYS)
    return {key: fields[key].contents() for key in wanted if key in fields}
