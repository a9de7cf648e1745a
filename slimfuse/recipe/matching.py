"""Whether a recipe's task, family and data go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimfuse.recipe.inputs import IMAGES, SOURCES, TEXTS, Data
from slimfuse.recipe.strict import Finding

TASK_FAMILIES = {
    "image-classification": ("vit", "deit"),
    "text-classification": ("bert", "roberta", "distilbert", "electra"),
}
"""Which families know a task."""

OTHERS_SOURCES = {"image-classification": TEXTS, "text-classification": IMAGES}
OTHERS_KEYS = {
    "image-classification": ("text_column", "max_length"),
    "text-classification": ("image_column", "image_size"),
}


def check_task(raw: Mapping[str, Any]) -> list[Finding]:
    """Return what doesn't go with the task: family, the data's source and keys, pictures."""
    task = raw.get("task")
    if task not in TASK_FAMILIES:
        return []
    family, data = raw.get("family"), dig(raw, "data") or {}
    known = {f for families in TASK_FAMILIES.values() for f in families}
    findings = []
    if family in known and family not in TASK_FAMILIES[task]:
        allowed = ", ".join(TASK_FAMILIES[task])
        findings.append(Finding(("family",), f"has no task {task!r}", allowed=allowed))
    what = f"doesn't go with task {task!r}"
    others = OTHERS_SOURCES[task]
    if dig(data, "source") in others:
        allowed = ", ".join(source for source in SOURCES if source not in others)
        findings.append(Finding(("data", "source"), what, allowed=allowed))
    for key in OTHERS_KEYS[task]:
        default = Data.model_fields[key].default
        if isinstance(data, Mapping) and data.get(key, default) != default:
            findings.append(Finding(("data", key), what, allowed="no such key"))
    if task == "text-classification":
        findings += _check_pictures(raw)
    return findings


def _check_pictures(raw: Mapping[str, Any]) -> list[Finding]:
    """Return the places where texts would be changed like pictures."""
    places: list[tuple[tuple[str | int, ...], Any]] = [(("finetune",), dig(raw, "finetune"))]
    for i, parent in enumerate(items(raw.get("parents"))):
        places.append((("parents", i, "train"), dig(parent, "train")))
    return [
        Finding((*place, "augment"), "changes pictures, not texts", allowed="[]")
        for place, value in places
        if items(dig(value, "augment"))
    ]


def dig(value: Any, *keys: str) -> Any:
    """Return what the keys lead to, or None where the way ends."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def items(value: Any) -> list[Any]:
    """Return a list's items, none of anything else."""
    return list(value) if isinstance(value, list | tuple) else []
