"""Whether a recipe's task, family, data and gates go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimfuse.recipe.inputs import IMAGES, SOURCES, TEXTS, UNLABELLED, Data
from slimfuse.recipe.problems import Loc
from slimfuse.recipe.strict import Finding

IMAGE_FAMILIES = ("vit", "deit", "dinov2", "timm-vit")
ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "electra")
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "gemma3")
TASK_FAMILIES = {
    "image-classification": IMAGE_FAMILIES,
    "text-classification": ENCODERS,
    "masked-lm": ENCODERS,
    "causal-lm": DECODERS,
    "sentence-embedding": ENCODERS,
    "feature-extraction": (*ENCODERS, *IMAGE_FAMILIES),
}
"""Which families know a task."""

IMAGE_KEYS = ("image_column", "image_size")
TEXT_KEYS = (
    "text_column", "max_length", "text_unit", "label_kind", "label_columns", "label_separator",
    "tokenizer", "vocabulary",
)  # fmt: skip
GROUPED = ("llama", "qwen2", "qwen3", "gemma3")
"""Families with rotary positions, whose queries may share key heads."""
LANGUAGE = ("masked-lm", "causal-lm")
EMBEDDING = ("sentence-embedding", "feature-extraction")
TASK_METRICS = {
    "image-classification": ("accuracy",),
    "text-classification": ("accuracy", "micro_f1", "spearman"),
    "masked-lm": ("perplexity",),
    "causal-lm": ("perplexity",),
    "sentence-embedding": ("spearman",),
    "feature-extraction": ("spearman",),
}
"""What a gate on a task's quality may measure."""
SPEED = ("latency_p50", "params")


def check_task(raw: Mapping[str, Any]) -> list[Finding]:
    """Return what doesn't go with the task: family, the data's source and keys, gates, pictures."""
    task = word(raw.get("task"))
    if task not in TASK_FAMILIES:
        return []
    family, data = word(raw.get("family")), dig(raw, "data") or {}
    known = {f for families in TASK_FAMILIES.values() for f in families}
    findings = []
    if family in known and family not in TASK_FAMILIES[task]:
        allowed = ", ".join(TASK_FAMILIES[task])
        findings.append(Finding(("family",), f"has no task {task!r}", allowed=allowed))
    elif family not in known and len({f in IMAGE_FAMILIES for f in TASK_FAMILIES[task]}) > 1:
        return findings  # whether images or texts is yet to be said
    pictures = task == "image-classification" or family in IMAGE_FAMILIES
    what = f"doesn't go with task {task!r}"
    others = TEXTS if pictures else IMAGES
    if dig(data, "source") in others:
        allowed = ", ".join(source for source in SOURCES if source not in others)
        findings.append(Finding(("data", "source"), what, allowed=allowed))
    for key in TEXT_KEYS if pictures else IMAGE_KEYS:
        if not _is_default(data, key):
            findings.append(Finding(("data", key), what, allowed="no such key"))
    if task not in LANGUAGE and not _is_default(data, "packing"):
        findings.append(Finding(("data", "packing"), what, allowed="no such key"))
    if task == "text-classification" and dig(data, "source") in UNLABELLED:
        findings.append(Finding(("data", "source"), "has no labels, which this task needs"))
    if pictures and dig(raw, "finetune", "freeze_embeddings"):
        place = ("finetune", "freeze_embeddings")
        findings.append(Finding(place, "is for texts, not pictures", allowed="false"))
    if not pictures:
        findings += _check_pictures(raw) + _check_tokens(raw)
    findings += _check_training(raw, task, family, pictures=pictures)
    if family == "timm-vit":
        findings += [
            Finding(("parents", i, "train", "start"), "isn't known for timm-vit", allowed="null")
            for i, parent in enumerate(items(raw.get("parents")))
            if dig(parent, "train", "start") is not None
        ]
    return findings + _check_gates(raw, task)


def _is_default(data: Any, key: str) -> bool:
    default = Data.model_fields[key].default
    value = data.get(key, default) if isinstance(data, Mapping) else default
    return bool(value == default or (default == () and value == []))


def _check_gates(raw: Mapping[str, Any], task: str) -> list[Finding]:
    """Return the gates on what the task doesn't measure."""
    every = {metric for metrics in TASK_METRICS.values() for metric in metrics}
    return [
        Finding(
            ("gates", i, "metric"),
            f"isn't measured in task {task!r}",
            allowed=", ".join((*TASK_METRICS[task], *SPEED)),
        )
        for i, gate in enumerate(items(raw.get("gates")))
        if word(dig(gate, "metric")) in every - set(TASK_METRICS[task])
    ]


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


def _check_tokens(raw: Mapping[str, Any]) -> list[Finding]:
    """Return what is wrong with where the tokenizer of texts comes from."""
    data = dig(raw, "data") or {}
    models = [*items(raw.get("parents")), dig(raw, "fuse", "ot", "anchor")]
    fresh = [m for m in models if dig(m, "train", "config") is not None]
    saved = [m for m in models if _origin(m) is not None]
    given = [key for key in ("tokenizer", "vocabulary") if dig(data, key) is not None]
    if saved and "vocabulary" in given:
        what = "the saved models bring a tokenizer"
        return [Finding(("data", "vocabulary"), what, allowed="null")]
    if fresh and not saved and not given:
        what = "missing key: models trained from scratch need 'tokenizer' or 'vocabulary'"
        return [Finding(("data",), what)]
    return []


def _check_training(
    raw: Mapping[str, Any], task: str, family: Any, *, pictures: bool
) -> list[Finding]:
    """Return what doesn't go with the task and the family in models that the run trains."""
    places: list[tuple[Loc, Any]] = [
        (("parents", i, "train"), dig(p, "train")) for i, p in enumerate(items(raw.get("parents")))
    ]
    places.append((("fuse", "ot", "anchor", "train"), dig(raw, "fuse", "ot", "anchor", "train")))
    findings = []
    for place, train in places:
        if train is not None and task in EMBEDDING:
            what = f"task {task!r} has nothing that a parent could learn from"
            findings.append(Finding(place, what, allowed="from, a saved model"))
        config = dig(train, "config")
        if isinstance(config, Mapping):
            findings += _check_config((*place, "config"), config, family, pictures=pictures)
    return findings


def _check_config(
    place: Loc, config: Mapping[str, Any], family: Any, *, pictures: bool
) -> list[Finding]:
    """Return what is wrong with the shape of a new model of this family."""
    patch, keys = config.get("patch_size"), config.get("num_key_value_heads")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    findings = []
    if pictures and patch is None:
        findings.append(Finding(place, "missing key: images need 'patch_size'"))
    if not pictures and patch is not None:
        what = "is of images, not of texts"
        findings.append(Finding((*place, "patch_size"), what, allowed="no such key"))
    if keys is not None and family not in GROUPED:
        what = f"family {family!r} has a key head for every head"
        findings.append(Finding((*place, "num_key_value_heads"), what, allowed="no such key"))
    elif type(keys) is int and type(heads) is int and (keys < 1 or heads % keys):
        what = f"does not divide num_attention_heads {heads}"
        findings.append(Finding((*place, "num_key_value_heads"), what))
    if family in GROUPED and type(width) is int and type(heads) is int and heads >= 1:
        units, rest = divmod(width, heads)
        if units % 2 and not rest:
            what = f"gives heads of {units} units, and rotary positions turn pairs"
            allowed = f"a multiple of {2 * heads}"
            findings.append(Finding((*place, "hidden_size"), what, allowed=allowed))
    return findings


def _origin(model: Any) -> Any:
    """Return where a saved model is that a parent or an anchor is, or starts from."""
    return dig(model, "from") or dig(model, "train", "start")


def dig(value: Any, *keys: str) -> Any:
    """Return what the keys lead to, or None where the way ends."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def items(value: Any) -> list[Any]:
    """Return a list's items, none of anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def word(value: Any) -> str | None:
    """Return a text; None for anything else, which may not be looked up in a table of words."""
    return value if isinstance(value, str) else None
