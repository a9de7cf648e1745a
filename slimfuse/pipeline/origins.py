"""Where a recipe's models come from: folders, GGUF files, installed packages, the hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from slimfuse.data.gguf import SUFFIX, converted, find_gguf
from slimfuse.data.packages import PACKAGE, find_package
from slimfuse.errors import ParentError, first_line
from slimfuse.families import TASK_FAMILIES
from slimfuse.pipeline.lookup import fetch, find_here
from slimfuse.store import file_digest
from slimfuse.tasks import Task

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""Of weights in several files: which file has which weight."""
FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors
LONGEST = 255  # bytes of a file's name
FETCHED = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "LICENCE*",
)  # fmt: skip
"""What is fetched of a hub's repository; generation_config.json and tokenizer files are JSON."""


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

    where: the recipe's place that holds `from`. `package:NAME` is an installed Python package. A
    GGUF file, or a folder with one, is converted once and kept in the user's cache.
    """
    key = "from" if where is None or "train" not in where else "start"
    where = where or f"parents.{name}"
    if origin.startswith(PACKAGE):
        return _ready(name, find_package(origin, where=f"{where}.{key}"), task, f"{where}.{key}")
    path = find_here(origin, beside)
    if path is not None and revision is not None:
        raise ParentError(
            "a revision goes only with a hub id, and this is on this machine",
            where=f"{where}.revision",
            got=revision,
            hint="remove the key",
        )
    if path is None:
        needed = ", ".join(("config.json", WEIGHTS, *task.files))
        path = fetch(
            origin, beside, FETCHED, what=f"parent {name!r}", where=f"{where}.{key}",
            hint=f"give a folder with {needed}, a .gguf file, or a hub id while online",
            revision=revision,
        )  # fmt: skip
    return _ready(name, path, task, f"{where}.{key}")


def _ready(name: str, path: Path, task: Task, where: str) -> Path:
    """Return the folder of a model that is here, with all files it needs."""
    file = find_gguf(path)
    if file is not None:
        known = {family.removesuffix("_text") for family in TASK_FAMILIES["causal-lm"]}
        path = converted(file, known, where=where)
    _need_files(name, path, task)
    _need_floats(name, path)
    return path


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a model's weights in order of their names, none where there are none.

    Raises ParentError for an index that can't be read, or that names files elsewhere.
    """
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    index = folder / INDEX
    if not index.is_file():
        return ()
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        odd = [n for n in names if not _beside(n)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParentError(
            "the index of the weights can't be read", where=str(index), got=first_line(error)
        ) from error
    if odd or not names:
        raise ParentError(
            "the index of the weights names other files than safetensors beside it",
            where=str(index),
            got=", ".join(ascii(name[:100]) for name in odd[:5]) or "no file",
        )
    return tuple(folder / name for name in names)


def _beside(name: str) -> bool:
    """Tell whether a name in an index is that of a file beside it, on any disk."""
    plain = Path(name).name == name and not {*"\\:\0"} & {*name}
    return plain and name.endswith(".safetensors") and len(name.encode()) <= LONGEST


def weights_digest(folder: Path) -> str:
    """Return the sha256 of a model's weights; of several files that of their names and digests."""
    files = weight_files(folder)
    if len(files) == 1:
        return file_digest(files[0])
    lines = "".join(f"{file.name} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def is_timm(folder: Path) -> bool:
    """Return whether a folder is timm's own: its config names an architecture, not a class."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" in config and "model_type" not in config


def _need_files(name: str, folder: Path, task: Task) -> None:
    """Raise ParentError where a model's folder lacks files; timm's config prepares images, too."""
    timm = "preprocessor_config.json" in task.files and is_timm(folder)
    needed = ["config.json"] if timm else ["config.json", *task.files]
    weights = weight_files(folder) or (folder / WEIGHTS,)
    missing = [f for f in needed if not (folder / f).is_file()]
    missing += [file.name for file in weights if not file.is_file()]
    if not missing:
        return
    hint = f"save the model and its {task.preprocessor} with save_pretrained"
    if (folder / "pytorch_model.bin").is_file():
        hint = f"pytorch_model.bin is not read: {hint}"
    several = sorted(folder.glob(f"*{SUFFIX}"))
    if several:
        listed = ", ".join(file.name for file in several[:5])
        hint = f"name one of the folder's .gguf files ({listed}); or {hint}"
    raise ParentError(f"parent {name!r} lacks {', '.join(missing)}", where=str(folder), hint=hint)


def _need_floats(name: str, folder: Path) -> None:
    """Raise ParentError where a model is stored in small numbers with scales beside them.

    The stock class would read them as they are, without their scales. A file that can't be read
    is told of where its weights are.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        told = config.get("quantization_config")
        whole = [
            f"{key} in {kind}"
            for file in weight_files(folder)
            for key, kind in _kinds(file)
            if key.endswith(".weight") and kind not in FLOATS
        ]
    except (OSError, ValueError, AttributeError, SafetensorError):
        return
    method = told.get("quant_method", "yes") if isinstance(told, dict) else told
    if not method and not whole:
        return
    raise ParentError(
        f"parent {name!r} is quantised, and its weights are wanted as float numbers",
        where=str(folder),
        got=f"quantization_config: {method}" if method else ", ".join(whole[:3]),
        allowed="float64, float32, float16, bfloat16",
        hint="take the model it was made of, or dequantise it and save it with save_pretrained",
    )


def _kinds(file: Path) -> list[tuple[str, str]]:
    """Return the names and number formats of a file's tensors; only its header is read."""
    with safe_open(file, "pt") as opened:
        return [(key, opened.get_slice(key).get_dtype()) for key in opened.keys()]  # noqa: SIM118
