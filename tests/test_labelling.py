"""Classes: which of the data's a model knows, and on which samples a parent is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import SHAPE, TRAIN, recipe, write_recipe

from slimfuse.data import ImageData, Split, TextData, load_digits
from slimfuse.errors import DataError
from slimfuse.families import ViT
from slimfuse.families.base import Shape
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.labelling import (
    check_training,
    class_places,
    labelled,
    training_split,
    with_labels,
)
from slimfuse.pipeline.planning import make_plan
from slimfuse.pipeline.stages import Stages
from slimfuse.pipeline.teaching import spread
from slimfuse.recipe import Train, load_recipe
from slimfuse.store import Store
from slimfuse.tasks import accuracy


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_digits()


def config(*labels: str) -> Any:
    return ViT().new_config(Shape(8, 2, 6, 1), patch_size=4, image_size=8, labels=labels)


def train(**keys: Any) -> Train:
    return Train.model_validate({**TRAIN, **keys})


NAMES = tuple(str(i) for i in range(10))
GENERIC = tuple(f"LABEL_{i}" for i in range(10))


def test_classes_are_known_by_name_in_any_order(digits: ImageData) -> None:
    found = class_places(
        {"a": config("7", "0"), "b": config(*reversed(NAMES)), "c": config(*GENERIC)}, digits
    )
    assert found == {"a": (7, 0), "b": tuple(range(9, -1, -1)), "c": tuple(range(10))}


@pytest.mark.parametrize(
    "labels", [("0", "ten"), ("0", "0", "1"), GENERIC[:7], ("LABEL_0", "1")], ids=str
)
def test_labels_that_are_not_the_datas(digits: ImageData, labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="labels are not the data set's") as error:
        class_places({"a": config(*NAMES), "b": config(*labels)}, digits)
    assert error.value.where == "parents.b"
    assert str(error.value.got).startswith(f"{len(labels)}: {labels[0]}, ")
    assert error.value.allowed == "10, or some of them by name: 0, 1, 2, 3, 4, 5, …"


def test_classes_that_no_parent_knows(digits: ImageData) -> None:
    halves = {"a": config(*NAMES[:5]), "b": config(*NAMES[6:])}
    with pytest.raises(DataError, match="no parent knows") as error:
        class_places(halves, digits)
    assert error.value.got == "5"
    lone = class_places({"anchor": halves["a"]}, digits, where="fuse.ot.anchor")
    assert lone == {"anchor": (0, 1, 2, 3, 4)}  # the caller's matter


def test_a_target_has_all_classes_in_the_datas_order(digits: ImageData) -> None:
    halves = {"a": config(*NAMES[:5]), "b": config(*NAMES[5:])}
    made = with_labels(halves["a"], halves, digits)
    assert list(made.id2label.values()) == list(NAMES) and made.num_labels == 10
    assert made.label2id["7"] == 7
    assert halves["a"].num_labels == 5  # the parent's config is only read
    shuffled = {"a": config(*reversed(NAMES))}
    assert list(with_labels(shuffled["a"], shuffled, digits).id2label.values()) == list(NAMES)
    whole = config(*GENERIC)
    assert with_labels(whole, {"a": whole}, digits) is whole  # names it never had aren't invented


def test_a_split_holds_the_classes_in_the_parents_own_order(digits: ImageData) -> None:
    split = training_split(train(classes=["7", "0", "3"]), digits)
    whole = digits.train.labels
    assert len(split) == int(np.isin(whole, [7, 0, 3]).sum())
    places = np.array([7, 0, 3])[split.labels]
    kept = np.flatnonzero(np.isin(whole, [7, 0, 3]))
    assert np.array_equal(places, whole[kept])
    for i in (0, 40, len(split) - 1):
        assert np.array_equal(split.items[i], digits.train.items[int(kept[i])])


def test_samples_are_drawn_before_the_shards_are_cut(digits: ImageData) -> None:
    parts = [training_split(train(samples=31, shard=f"{i}/2"), digits) for i in (1, 2)]
    assert [len(p) for p in parts] == [16, 15]
    seen = [np.asarray(image).tobytes() for p in parts for image in p.items]
    drawn = digits.train.sample(31, 0)
    assert sorted(seen) == sorted(np.asarray(image).tobytes() for image in drawn.items)
    assert training_split(train(), digits) is digits.train
    assert len(training_split(train(samples=10**6), digits)) == len(digits.train)


@pytest.mark.parametrize(
    ("keys", "where", "words"),
    [
        ({"classes": ["0", "seven"]}, "x.classes", "there is no such class"),
        ({"samples": 2, "shard": "1/3"}, "x.shard", "fewer training samples than shards"),
        ({"samples": 1, "classes": ["9"]}, "x", "no training sample is left"),
    ],
)
def test_training_that_cannot_be_done(
    digits: ImageData, keys: dict[str, Any], where: str, words: str
) -> None:
    drawn = int(digits.train.sample(1, 0).labels[0])
    assert drawn != 9, "else a sample is left"
    with pytest.raises(DataError, match=words) as error:
        check_training(train(**keys), digits, "x")
    assert error.value.where == where


def test_a_misspelt_class_is_told_with_what_was_meant(tmp_path: Path) -> None:
    parents = [{"name": "a", "train": {**TRAIN, "classes": ["0", "11"]}}]
    path = write_recipe(tmp_path / "r.yaml", recipe(parents=parents))
    with pytest.raises(DataError, match="no such class") as error:
        prepare(load_recipe(path), path)
    assert error.value.where == "parents.a.train.classes" and error.value.got == "11"
    assert error.value.hint == "did you mean '1'?"


def test_logits_are_spread_to_the_places_of_the_classes() -> None:
    scores = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    wide = spread(scores, (2, 0), 4)
    assert torch.equal(wide[:, [2, 0]], scores)
    assert bool((wide[:, [1, 3]] < -1000).all())
    assert spread(scores, (0, 1), 2) is scores


def test_a_parent_of_some_classes_is_trained_planned_and_measured_over_all(tmp_path: Path) -> None:
    low, high = NAMES[:5], NAMES[:4:-1]  # the second in another order
    spec = {**TRAIN, "config": SHAPE, "epochs": 12, "batch_size": 16}
    content = recipe(
        parents=[{"name": "a", "train": {**spec, "classes": list(low)}},
                 {"name": "b", "train": {**spec, "classes": list(high)}}],
        data={"limit": {"train": 300, "test": 200}},
    )  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", content)
    job = prepare(load_recipe(path), path)
    stages = Stages(job, Store(tmp_path))
    assert [p.places for p in job.parents] == [(0, 1, 2, 3, 4), (9, 8, 7, 6, 5)]
    labels = job.data.test.labels
    counts = [int(np.isin(job.data.train.labels, p.places).sum()) for p in job.parents]
    planned = {m.name: m.steps for m in make_plan(job).models}
    for parent, count in zip(job.parents, counts, strict=True):
        assert planned[parent.name] == 12 * -(-count // 16)
        evidence = stages.outputs(parent).test
        scores = evidence["logits"]
        assert scores.shape == (200, 10)
        own = np.isin(labels, parent.places)
        assert set(scores.argmax(1).tolist()) <= set(parent.places)
        measured = stages.figures(evidence)["accuracy"].value
        right = (scores.argmax(1).numpy() == labels)[own].mean()
        assert right > 0.5  # it has learnt its classes: by chance 0.2
        assert measured == pytest.approx(right * own.mean(), abs=1e-12)  # nothing of the others
        assert accuracy(scores, labels).n == 200


def texts(kind: Any, classes: tuple[str, ...], labels: Any) -> TextData:
    split = Split(["x", "y", "z"], np.array(labels))
    return TextData("it", split, split, classes, "mark", kind=kind)


NUMBERS = texts("regression", ("rating",), np.float32([1, 2, 3]))
MARKS = texts("multi", ("a", "b", "c"), np.float32([[1, 0, 1], [0, 0, 0], [0, 1, 1]]))
NOTHING = texts("none", (), [0, 0, 0])


def test_a_number_has_one_place_whatever_its_name() -> None:
    found = class_places({"a": config("LABEL_0"), "b": config("score")}, NUMBERS)
    assert found == {"a": (0,), "b": (0,)}
    made = with_labels(config("score"), {"b": config("score")}, NUMBERS)
    assert made.id2label == {0: "rating"} and made.num_labels == 1


def test_a_model_of_classes_says_no_number() -> None:
    with pytest.raises(DataError, match="has one output") as error:
        class_places({"a": config("x", "y")}, NUMBERS)
    assert error.value.got == "2 outputs" and error.value.where == "parents.a"


def test_several_classes_are_known_by_name() -> None:
    assert class_places({"a": config("c", "a", "b")}, MARKS) == {"a": (2, 0, 1)}


def test_data_without_labels_change_no_config() -> None:
    one = config("x", "y")
    assert class_places({"a": one, "b": config("z")}, NOTHING) == {"a": (), "b": ()}
    assert with_labels(one, {"a": one}, NOTHING) is one
    assert labelled(one, NOTHING.classes).id2label == one.id2label


@pytest.mark.parametrize(
    ("data", "problem"),
    [(NUMBERS, "single_label_classification"), (MARKS, "regression")],
    ids=["regression", "multi"],
)
def test_a_model_that_was_made_for_other_labels_is_told(data: TextData, problem: str) -> None:
    made = config(*data.classes)
    made.problem_type = problem
    with pytest.raises(DataError, match="made for other labels") as error:
        class_places({"a": made}, data)
    assert error.value.got == f"problem_type {problem}"
    assert "data.label_kind" in str(error.value.hint)


def test_of_several_classes_a_parent_sees_its_own_in_every_sample() -> None:
    split = training_split(train(classes=["c", "a"]), MARKS)
    assert split.labels.tolist() == [[1, 1], [0, 0], [1, 0]] and list(split.items) == [
        "x",
        "y",
        "z",
    ]


@pytest.mark.parametrize("data", [NUMBERS, NOTHING], ids=["regression", "none"])
def test_classes_of_data_that_have_none(data: TextData) -> None:
    with pytest.raises(DataError, match="has no classes") as error:
        check_training(train(classes=["rating"]), data, "x")
    assert error.value.where == "x.classes"
    check_training(train(), data, "x")
