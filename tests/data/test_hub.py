"""Image folders and local data sets through `datasets`, and what goes wrong with them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slimfuse.data import load_hub
from slimfuse.errors import DataError


def load(folder: Path, **changes: Any) -> Any:
    return load_hub(str(folder), **{"folder": True, "test_split": "validation", **changes})


def test_an_image_folder_gives_every_image_with_its_class(folder: Path) -> None:
    data = load(folder)
    assert (data.name, data.classes) == ("zoo", ("cat", "dog", "emu"))
    assert np.bincount(data.train.labels).tolist() == [5, 3, 2]
    assert np.bincount(data.test.labels).tolist() == [2, 1, 1]
    files = {
        (label, np.asarray(Image.open(file)).tobytes())
        for label, name in enumerate(data.classes)
        for file in (folder / "train" / name).iterdir()
    }
    found = {(int(y), data.train.items[i].tobytes()) for i, y in enumerate(data.train.labels)}
    assert found == files
    assert data.train.items[0].shape == (7, 5, 3)


def test_grey_and_transparent_images_come_as_rgb(folder: Path) -> None:
    Image.fromarray(np.full((7, 5), 9, dtype=np.uint8)).save(folder / "train/cat/0.png")
    Image.fromarray(np.full((7, 5, 4), 9, dtype=np.uint8)).save(folder / "train/cat/1.png")
    images = load(folder).train.items
    assert {images[i].shape for i in range(len(images))} == {(7, 5, 3)}


def test_the_fingerprint_is_stable_and_follows_the_images(folder: Path) -> None:
    first = load(folder).fingerprint
    assert load(folder).fingerprint == first
    Image.fromarray(np.zeros((7, 5, 3), dtype=np.uint8)).save(folder / "train/cat/0.png")
    assert load(folder).fingerprint != first


def test_the_fingerprint_is_of_the_content_not_of_the_place_or_the_time(
    folder: Path, tmp_path: Path
) -> None:
    first = load(folder)
    copy = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, copy)
    for file in copy.rglob("*"):
        os.utime(file, (1, 1))
    assert load(copy).fingerprint == first.fingerprint
    (copy / "train/cat/0.png").rename(copy / "train/dog/zero.png")  # same bytes, other label
    assert load(copy).fingerprint != first.fingerprint


def test_a_local_path_is_in_no_name(tmp_path: Path) -> None:
    data = load_hub(str(saved(tmp_path / "secret" / "set", [0, 1, 1], [1, 0], ["a", "b"])))
    assert data.name == "set"
    again = load_hub(str(saved(tmp_path / "other" / "set", [0, 1, 1], [1, 0], ["a", "b"])))
    assert again.fingerprint == data.fingerprint
    other = load_hub(str(saved(tmp_path / "third" / "set", [0, 1, 0], [1, 0], ["a", "b"])))
    assert other.fingerprint != data.fingerprint


def test_a_wrong_column_names_the_columns_there_are(folder: Path) -> None:
    with pytest.raises(DataError, match="column 'picture' does not exist") as caught:
        load(folder, image_column="picture")
    assert caught.value.allowed == "image, label"
    assert caught.value.hint == "set data.image_column"
    with pytest.raises(DataError, match="column 'breed' does not exist") as caught:
        load(folder, label_column="breed")
    assert caught.value.hint == "set data.label_column"


def test_a_wrong_split_names_the_splits_there_are(folder: Path) -> None:
    with pytest.raises(DataError, match="split 'test' does not exist") as caught:
        load(folder, test_split="test")
    assert caught.value.allowed == "train, validation"
    assert "data.test_split" in str(caught.value.hint)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        load(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_empty_folder_is_an_error_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="could not be loaded"):
        load(tmp_path / "empty")


def write_table(folder: Path, rows: str) -> Path:
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("image,label\n" + rows)
    return folder


def test_a_label_that_is_not_a_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'label' is not a class label") as caught:
        load_hub(str(write_table(tmp_path / "table", "a,1\nb,2\n")))
    assert "int64" in str(caught.value.got)


def saved(folder: Path, train: list[int], test: list[int], test_names: list[str]) -> Path:
    """Write a data set with typed columns as parquet."""
    import datasets

    for split, labels, names in (("train", train, ["a", "b"]), ("test", test, test_names)):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        images = [Image.fromarray(np.full((2, 2, 3), 7, dtype=np.uint8)) for _ in labels]
        part = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        folder.mkdir(parents=True, exist_ok=True)
        part.to_parquet(folder / f"{split}.parquet")
    return folder


def test_a_local_folder_of_tables_with_class_labels_is_read(tmp_path: Path) -> None:
    data = load_hub(str(saved(tmp_path / "set", [0, 1, 1], [1, 0], ["a", "b"])))
    assert data.train.labels.tolist() == [0, 1, 1] and data.test.labels.tolist() == [1, 0]
    assert data.test.items[0].tolist() == [[[7] * 3] * 2] * 2


def test_files_that_name_the_classes_differently_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", [0, 1, 1], [1, 0], ["b", "a"])
    with pytest.raises(DataError, match="name the classes differently"):
        load_hub(str(folder))
    assert load_hub(str(folder), labels=False).kind == "none"


def test_without_labels_images_may_lie_anywhere_in_a_split(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat" / "zoo"
    for split in ("train", "validation"):
        (flat / split).mkdir(parents=True)
        for i, file in enumerate(sorted((folder / split).rglob("*.png"))):
            shutil.copy(file, flat / split / f"{i}.png")
    data = load(flat, labels=False)
    assert (data.kind, data.classes) == ("none", ())
    assert data.train.labels.tolist() == [0] * 10 and data.test.items[3].shape == (7, 5, 3)
    sorted_out = load(folder, labels=False)
    assert sorted_out.classes == () and len(sorted_out.train) == 10
    first = data.fingerprint
    assert load(flat, labels=False).fingerprint == first
    Image.fromarray(np.zeros((7, 5, 3), dtype=np.uint8)).save(flat / "train/0.png")
    assert load(flat, labels=False).fingerprint != first


def test_unlabelled_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split 'test' has rows without a label"):
        load_hub(str(saved(tmp_path / "set", [0, 1], [-1, 0], ["a", "b"])))


def test_an_error_without_a_message_is_told_by_its_kind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(DataError) as caught:
        load(folder)
    assert "NotImplementedError" in str(caught.value.got)
