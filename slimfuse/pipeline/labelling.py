"""Which of the data's classes every model knows, and on which samples a parent is trained."""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from slimfuse.data import DataSet, Split, TextData
from slimfuse.data.base import draw
from slimfuse.errors import DataError
from slimfuse.recipe import Data, MeasuredPart, Train, Training
from slimfuse.tasks.text_classification import PROBLEMS

SHOWN = 6
D = TypeVar("D", bound=DataSet)


def class_places(
    configs: Mapping[str, Any], data: DataSet, *, where: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the places of every parent's classes among the data's; together they cover all.

    Classes are known by name; a config without names (LABEL_0 …) must have as many as the data.
    A number has one place, whatever its name; data without labels have none. where: of a model
    that is no parent, which need not cover all. Raises DataError.
    """
    found = {
        name: _places(where or f"parents.{name}", config, data) for name, config in configs.items()
    }
    missing = sorted(set(range(len(data.classes))) - {i for p in found.values() for i in p})
    if missing and where is None:
        raise DataError(
            "no parent knows some of the data set's classes",
            where="parents",
            got=_listed([data.classes[i] for i in missing]),
            hint="add a parent that was trained on them, or leave them out of the data",
        )
    return found


def _places(where: str, config: Any, data: DataSet) -> tuple[int, ...]:
    if data.kind == "none":
        return ()
    problem = getattr(config, "problem_type", None)
    if problem not in (None, PROBLEMS[data.kind]):
        raise DataError(
            "the model was made for other labels than the data set's",
            where=where,
            got=f"problem_type {problem}",
            allowed=PROBLEMS[data.kind],
            hint="set data.label_kind to what the model says",
        )
    if data.kind == "regression":
        if config.num_labels != 1:
            raise DataError(
                "a model that says a number has one output",
                where=where,
                got=f"{config.num_labels} outputs",
                hint="for classes set data.label_kind to single or multi",
            )
        return (0,)
    labels = [str(v) for _, v in sorted(config.id2label.items(), key=lambda kv: int(kv[0]))]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    if generic and len(labels) == len(data.classes):
        return tuple(range(len(labels)))
    known = {label: i for i, label in enumerate(data.classes)}
    if generic or set(labels) - set(known) or len(set(labels)) < len(labels):
        raise DataError(
            "the model's labels are not the data set's",
            where=where,
            got=f"{len(labels)}: {_listed(labels)}",
            allowed=f"{len(data.classes)}, or some of them by name: {_listed(data.classes)}",
            hint="use the data set that the model was fine-tuned on",
        )
    return tuple(known[label] for label in labels)


def labelled(config: Any, labels: Sequence[str]) -> Any:
    """Return a copy of a config with these classes; as it is where there are none."""
    named = copy.deepcopy(config)
    if not labels:
        return named
    named.id2label = dict(enumerate(labels))
    named.label2id = {label: i for i, label in enumerate(labels)}
    return named


def with_labels(config: Any, configs: Mapping[str, Any], data: DataSet) -> Any:
    """Return the target's config with all classes of the data, where no parent's do already."""
    if data.kind == "none" or any(list(c.id2label.values()) == list(config.id2label.values()) and
           len(c.id2label) == len(data.classes) and
           _same_order(c, data) for c in configs.values()):  # fmt: skip
        return config
    return labelled(config, data.classes)


def _same_order(config: Any, data: DataSet) -> bool:
    labels = tuple(str(v) for _, v in sorted(config.id2label.items(), key=lambda kv: int(kv[0])))
    return labels == data.classes or all(label == f"LABEL_{i}" for i, label in enumerate(labels))


def limited(data: D, spec: Data) -> D:
    """Return a data set with at most as many samples as the recipe allows.

    Of texts that are joined (`packing`) the first ones, since the next follows from the last. A
    validation part is taken from the training samples that are left, and stands for the test split.
    """
    joined = isinstance(data, TextData) and spec.packing
    train, test, mark = data.train, data.test, data.fingerprint
    train = _cut(train, spec.limit.train, joined=joined)
    if spec.validation is not None:
        train, test = _held_out(train, spec.validation, joined=joined)
        told = f"{mark} validation {len(test)} {spec.validation.seed}"
        mark = hashlib.sha256(told.encode()).hexdigest()
    test = _cut(test, spec.limit.test, joined=joined)
    return replace(data, train=train, test=test, fingerprint=mark)


def _held_out(split: Split, spec: MeasuredPart, *, joined: bool) -> tuple[Split, Split]:
    """Return what is left of a training split, and the part that is held out."""
    size = round(spec.share * len(split))
    if not 0 < size < len(split):
        raise DataError(
            "no samples are left to train on, or none to measure",
            where="data.validation.share",
            got=f"{spec.share:g} of {len(split)} training samples",
        )
    places = np.arange(len(split))
    held = places[-size:] if joined else draw(len(split), size, spec.seed)
    return split.take(np.setdiff1d(places, held)), split.take(held)


def _cut(split: Split, limit: int | None, *, joined: bool) -> Split:
    """Return at most `limit` samples: a seeded draw, since many sets are sorted by class."""
    if limit is None or limit >= len(split):
        return split
    return split.first(limit) if joined else split.sample(limit, seed=0)


def training_split(train: Training, data: DataSet, *, joined: bool = False) -> Split:
    """Return what a parent is trained on: its shard, classes and samples; labels are its own.

    Of samples that may have several classes all stay: that one has none of the parent's is news.
    joined: whether texts are joined; then samples are the first ones and a shard is a piece.
    """
    split = data.train
    if train.samples is not None:
        split = split.first(train.samples) if joined else split.sample(train.samples, 0)
    index, count = (int(n) for n in train.shard.split("/"))
    if count > 1:
        split = split.piece(index, count) if joined else split.shard(index, count)
    classes = _classes(train)
    if classes is not None:
        places = [data.classes.index(c) for c in classes]
        if data.kind == "multi":
            return Split(split.items, split.labels[:, places])
        split = split.take(np.flatnonzero(np.isin(split.labels, places)))
        own = {place: i for i, place in enumerate(places)}
        split = Split(split.items, np.array([own[int(y)] for y in split.labels], dtype=np.int64))
    return split


def _classes(train: Training) -> tuple[str, ...] | None:
    return train.classes if isinstance(train, Train) else None


def check_training(train: Training, data: DataSet, where: str) -> None:
    """Raise DataError for classes that don't exist and for more shards than samples."""
    if _classes(train) and data.kind not in ("single", "multi"):
        raise DataError("the data set has no classes", where=f"{where}.classes")
    for name in _classes(train) or ():
        if name not in data.classes:
            near = difflib.get_close_matches(name, data.classes, 1)
            raise DataError(
                "there is no such class",
                where=f"{where}.classes",
                got=name,
                allowed=_listed(data.classes),
                hint=f"did you mean {near[0]!r}?" if near else None,
            )
    count, samples = int(train.shard.split("/")[1]), len(data.train)
    if min(samples, train.samples or samples) < count:
        raise DataError(
            "there are fewer training samples than shards",
            where=f"{where}.shard",
            got=train.shard,
            allowed=f"up to {min(samples, train.samples or samples)} shards",
        )
    if not len(training_split(train, data)):
        raise DataError("no training sample is left", where=where)


def _listed(labels: list[str] | tuple[str, ...]) -> str:
    return ", ".join(labels[:SHOWN]) + (", …" if len(labels) > SHOWN else "")
