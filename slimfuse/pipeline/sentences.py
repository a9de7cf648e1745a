"""What saved sentence encoders do with texts beside their body, as sentence-transformers keeps it.

modules.json lists the modules; each keeps its own config in its folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimfuse.errors import ParentError, first_line
from slimfuse.tasks.embeddings import POOLED, Pooling

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
BODY = "sentence_bert_config.json"
CHAINS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
OLD = re.compile(r"pooling_mode_(\w+?)(_tokens?)?$")
"""Keys that older versions keep, one a mode, true or false."""


@dataclass(frozen=True)
class Encoder:
    """How a text becomes one embedding. longest: most tokens of it, None where that isn't said."""

    pooling: Pooling = "mean"
    longest: int | None = None


def common_encoder(folders: Mapping[str, Path]) -> Encoder:
    """Return what the encoders in some folders, by name, do alike, and the least of their limits.

    Raises ParentError where one does what isn't known, or where they pool differently.
    """
    found = {name: read_encoder(folder) for name, folder in folders.items()}
    poolings = {encoder.pooling for encoder in found.values()}
    if len(poolings) > 1:
        raise ParentError(
            "the parents pool their tokens differently",
            where="parents",
            got="; ".join(f"{name}: {encoder.pooling}" for name, encoder in found.items()),
            allowed="one pooling for all",
            hint="a folder without modules.json is pooled by the mean; fuse encoders that agree",
        )
    limits = [e.longest for e in found.values() if e.longest is not None]
    return Encoder(next(iter(poolings), "mean"), min(limits, default=None))


def read_encoder(folder: Path) -> Encoder:
    """Return what a saved encoder does; without modules.json the mean. Raises ParentError."""
    if not (folder / MODULES).is_file():
        return Encoder("mean", _longest(folder))
    modules = _read(folder / MODULES, list)
    try:
        chain = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in modules]
    except (TypeError, KeyError) as error:
        raise _broken(folder / MODULES, f"a module without {error}") from error
    kinds = [kind for kind, _ in chain]
    if kinds not in CHAINS:
        raise _refused(
            "has other modules than are known", folder / MODULES, ", ".join(kinds), CHAINS[-1]
        )
    told = _read(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    prompt = told.get("default_prompt_name")
    if prompt and (told.get("prompts") or {}).get(prompt, True):
        raise _refused(
            "puts a prompt before every text", folder / PROMPTS, f"default_prompt_name {prompt}",
            ["null"], hint="write the prompt into the texts and set default_prompt_name to null",
        )  # fmt: skip
    (_, body), (_, pooling), *_ = chain
    return Encoder(_pooling(folder / pooling / "config.json"), _longest(folder / body))


def _pooling(file: Path) -> Pooling:
    told = _read(file)
    modes = told.get("pooling_mode")
    if modes is None:
        old = [(OLD.match(key), on) for key, on in told.items()]
        modes = [match[1] for match, on in old if match and on] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(map(str, modes))
    for known in POOLED:
        if modes == [known]:
            return known
    raise _refused("pools in another way than is known", file, " and ".join(modes), list(POOLED))


def _longest(folder: Path) -> int | None:
    """Return the most tokens of a text, None where the file, or the value, is not there."""
    if not (folder / BODY).is_file():
        return None
    told = _read(folder / BODY)
    if told.get("do_lower_case"):
        raise _refused(
            "lower-cases texts before its tokenizer sees them", folder / BODY,
            "do_lower_case true", ["false"],
            hint="set it to false where the tokenizer does that anyway, or lower-case the texts",
        )  # fmt: skip
    most = told.get("max_seq_length")
    if most is not None and (type(most) is not int or most < 1):
        raise _broken(folder / BODY, f"max_seq_length {most!r}")
    return most


def _refused(
    what: str, file: Path, got: str, allowed: list[str], hint: str = "fuse encoders without that"
) -> ParentError:
    choice = ", ".join(allowed)
    return ParentError(
        f"the sentence encoder {what}", where=str(file), got=got, allowed=choice, hint=hint
    )


def _broken(file: Path, got: str) -> ParentError:
    return ParentError(
        "what the sentence encoder does can't be read",
        where=str(file),
        got=got,
        allowed="what sentence-transformers saves",
        hint="save the parent with it again; without modules.json tokens are pooled by the mean",
    )


def _read(file: Path, kind: type = dict) -> Any:
    """Return a JSON file's content; raises ParentError where it isn't of this kind."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(file, first_line(error)) from error
    if not isinstance(found, kind):
        raise _broken(file, type(found).__name__)
    return found
