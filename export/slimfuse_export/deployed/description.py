"""What a folder's files say of its model: the task, the labels, how embeddings are pooled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from slimfuse_export.errors import ExportError

Task = Literal[
    "image-classification",
    "text-classification",
    "sentence-embedding",
    "feature-extraction",
    "masked-lm",
    "causal-lm",
]
Problem = Literal["single", "multi", "regression"]
Pooling = Literal["mean", "cls", "none"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

CONFIG = "config.json"
MODULES = "modules.json"
TIMM = "pretrained_cfg"  # timm's record of the preprocessing, in config.json
_ENDINGS: tuple[tuple[str, Task], ...] = (
    ("ForImageClassification", "image-classification"),
    ("ForSequenceClassification", "text-classification"),
    ("ForMaskedLM", "masked-lm"),
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
)
_PROBLEMS: Mapping[str | None, Problem] = {
    None: "single",
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class Description:
    """What a folder's files say.

    labels: names of the classes in their order, empty where none are known. pooling: how token
    states become one embedding. unit: whether embeddings are scaled to length 1. positions: tokens
    that the model has places for. longest: tokens that sentence-transformers gives it. ends:
    ids of tokens that end a generated text. timm: timm's record of image preparation.
    """

    folder: Path
    task: Task
    labels: tuple[str, ...] = ()
    problem: Problem = "single"
    pooling: Pooling = "none"
    unit: bool = False
    positions: int | None = None
    longest: int | None = None
    lowercase: bool = False
    ends: frozenset[int] = frozenset()
    timm: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The folder's name; that of the run where the folder is called `model`."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "model" else folder.name


def describe(
    folder: str | os.PathLike[str], inputs: Sequence[str], outputs: Sequence[str]
) -> Description:
    """Return what the files of `folder` say of the model whose graph has these inputs and outputs.

    Raises: ExportError where there is no folder, a file can't be read or the task isn't known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError("there is no such folder", where=folder)
    config = read_json(folder / CONFIG)
    task = _task(folder, config, inputs, outputs)
    images = "pixel_values" in inputs
    pooling, unit = _pooling(folder, task, images)
    bert = _optional(folder / "sentence_bert_config.json") if task == "sentence-embedding" else {}
    generation = _optional(folder / "generation_config.json")
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    problem = config.get("problem_type")
    if problem not in _PROBLEMS:
        raise ExportError(
            "the kind of labels isn't known",
            where=folder / CONFIG,
            got=f"problem_type {problem!r}",
            allowed=", ".join(str(name) for name in _PROBLEMS if name),
        )
    timm = config.get(TIMM)
    return Description(
        folder,
        task,
        labels=_labels(config),
        problem=_PROBLEMS[problem],
        pooling=pooling,
        unit=unit,
        positions=_positions(config),
        longest=_whole(bert.get("max_seq_length")),
        lowercase=bert.get("do_lower_case") is True,
        ends=frozenset(_whole_numbers(ends)),
        timm=timm if isinstance(timm, dict) else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises ExportError where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{path.name} can't be read", where=path, got=type(error).__name__
        ) from error
    if not isinstance(found, dict):
        raise ExportError(f"{path.name} is no JSON object", where=path, got=type(found).__name__)
    return found


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _task(
    folder: Path, config: Mapping[str, Any], inputs: Sequence[str], outputs: Sequence[str]
) -> Task:
    """Return the task by the class's name; a plain net's by what its graph takes and gives."""
    if (folder / MODULES).is_file():
        return "sentence-embedding"
    if "last_hidden_state" in outputs:
        return "feature-extraction"
    named = config.get("architectures")
    classes = [str(name) for name in named] if isinstance(named, list) else []
    for ending, task in _ENDINGS:
        if any(name.endswith(ending) for name in classes):
            return task
    if "pixel_values" in inputs and "logits" in outputs:
        return "image-classification"
    raise ExportError(
        "the model's task isn't known",
        where=folder / CONFIG,
        got=f"architectures {', '.join(classes) or 'not named'}",
        allowed="classes that end in " + ", ".join(ending for ending, _ in _ENDINGS),
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the classes' names: transformers' id2label, timm's label_names, a plain net's."""
    named = config.get("id2label")
    if isinstance(named, dict):
        try:
            places = {int(key): str(label) for key, label in named.items()}
        except ValueError as error:
            raise ExportError("id2label's keys are no numbers", got=", ".join(named)) from error
        if sorted(places) != list(range(len(places))):
            raise ExportError("id2label leaves classes out", got=sorted(places))
        return tuple(places[i] for i in range(len(places)))
    for key in ("label_names", "labels"):
        listed = config.get(key)
        if isinstance(listed, list):
            return tuple(str(label) for label in listed)
    return ()


def _pooling(folder: Path, task: Task, images: bool) -> tuple[Pooling, bool]:
    """Return how states are pooled, and whether embeddings are of unit length.

    Features are pooled as slimfuse judges them: the mean of a text's tokens, an image's first.
    """
    if task == "feature-extraction":
        return ("cls" if images else "mean"), False
    if task != "sentence-embedding":
        return "none", False
    try:
        modules = [
            (str(m["type"]).rpartition(".")[2], str(m["path"]))
            for m in json.loads((folder / MODULES).read_bytes())
        ]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(f"{MODULES} can't be read", where=folder, got=repr(error)) from error
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ExportError(
            "these parts of a sentence encoder aren't known",
            where=folder / MODULES,
            got=", ".join(kinds),
            allowed="Transformer, Pooling, Normalize",
        )
    path = Path(modules[1][1])
    if path.is_absolute() or ".." in path.parts:
        raise ExportError("a path leads out of the folder", where=folder / MODULES, got=path)
    found = read_json(folder / path / CONFIG)
    modes = {k for k, v in found.items() if k.startswith("pooling_mode") and v is True}
    if isinstance(named := found.get("pooling_mode"), str):  # how newer releases say it
        modes = {f"pooling_mode_{named}"}
    known: dict[str, Pooling] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean": "mean",
        "pooling_mode_cls": "cls",
    }
    if len(modes) != 1 or not modes <= set(known):
        raise ExportError(
            "this pooling isn't known",
            where=folder / path / CONFIG,
            got=", ".join(sorted(modes)) or "none",
            allowed=", ".join(known),
        )
    return known[modes.pop()], "Normalize" in kinds


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens there are places for; RoBERTa's first ones are behind the padding."""
    found = next((n for key in _POSITIONS if (n := _whole(config.get(key)))), None)
    pad = _whole(config.get("pad_token_id"))
    if found and str(config.get("model_type")) in ("roberta", "xlm-roberta", "mpnet", "camembert"):
        return found - (1 if pad is None else pad) - 1
    return found


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _whole_numbers(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [n for v in values if (n := _whole(v)) is not None]
