"""Processors of both worlds prepare the same pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from slimfuse.data import load_digits
from slimfuse.errors import ParentError
from slimfuse.pipeline.images import common_processor
from slimfuse.tasks.image_processors import (
    from_timm,
    load_processor,
    make_processor,
    save_processor,
    sides,
    to_timm,
)

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
RECORD: dict[str, Any] = {"input_size": [3, 20, 20], "mean": MEAN, "std": STD}
# 8-bit images after resizing: one of the two rounds a value of 255 the other way at most
ONE_STEP = 1.01 / 255 / min(STD)


def image(height: int, width: int) -> NDArray[np.uint8]:
    """Return a smooth image, so that a shift of the cut would show."""
    rows, columns = np.mgrid[:height, :width]
    planes = [rows * 5, columns * 4, (rows + columns) * 2]
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def ours(processor: Any, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    made: NDArray[np.float32] = processor(images=[picture], return_tensors="np")["pixel_values"][0]
    return made


def theirs(record: dict[str, Any], picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what timm makes of an image for evaluation."""
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=record), is_training=False
    )
    made: torch.Tensor = transform(Image.fromarray(picture))
    return made.numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(
    ("own", "size"),
    [
        ({"crop_pct": 1.0, "crop_mode": "squash"}, (31, 44)),
        ({"crop_pct": 1.0, "crop_mode": "center"}, (30, 46)),
        ({"crop_pct": 0.8, "crop_mode": "center"}, (50, 38)),  # 25, an odd rest of 5
        ({"crop_pct": 0.875, "crop_mode": "center"}, (44, 44)),  # 22.86, down to 22
        ({"crop_pct": 0.9, "crop_mode": "squash"}, (33, 41)),  # 22.2, down to 22
    ],
)
def test_the_stock_processor_makes_timms_pixels(
    own: dict[str, Any], size: tuple[int, int], interpolation: str
) -> None:
    record = {**RECORD, **own, "interpolation": interpolation}
    processor, picture = from_timm(record, "here"), image(*size)
    found, want = ours(processor, picture), theirs(record, picture)
    assert found.shape == want.shape == (3, 20, 20) and sides(processor) == (20, 20)
    assert float(np.abs(found - want).max()) <= ONE_STEP
    # and back: timm, told what the processor does, makes the same pixels as before
    again = to_timm(processor)
    assert float(np.abs(theirs(again, picture) - want).max()) == 0
    assert ours(from_timm(again, "here"), picture).tolist() == found.tolist()


def test_what_a_record_leaves_open_is_timms_own() -> None:
    picture = image(300, 300)
    found, want = ours(from_timm({}, "here"), picture), theirs({"crop_pct": None}, picture)
    assert found.shape == want.shape == (3, 224, 224)
    assert float(np.abs(found - want).max()) <= 1.01 / 255 / 0.224


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"input_size": [3, 20, 24]}, "input_size"),
        ({"input_size": [1, 20, 20]}, "input_size"),
        ({"crop_mode": "border"}, "crop_mode border"),
        ({"crop_pct": 1.2}, "crop_pct 1.2"),
        ({"interpolation": "random"}, "interpolation random"),
    ],
)
def test_preprocessing_of_other_kinds_is_refused(own: dict[str, Any], told: str) -> None:
    with pytest.raises(ParentError, match="isn't known") as caught:
        from_timm({**RECORD, **own}, "here")
    assert told in str(caught.value.got) and caught.value.where == "here"


def test_a_timm_folder_gets_both_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"architecture": "vit", "pretrained_cfg": {"crop_pct": 0.9, "license": "mit"}})
    )
    processor, picture = make_processor(20, MEAN, STD), image(25, 40)
    save_processor(processor, tmp_path)
    record = json.loads(file.read_text())["pretrained_cfg"]
    assert record["license"] == "mit" and record["crop_pct"] == 1 and record["mean"] == list(MEAN)
    assert (tmp_path / "preprocessor_config.json").is_file()
    loaded = load_processor(tmp_path)
    assert ours(loaded, picture).tolist() == ours(processor, picture).tolist()
    assert type(loaded) is type(processor)
    assert float(np.abs(theirs(record, picture) - ours(processor, picture)).max()) <= ONE_STEP
    (tmp_path / "preprocessor_config.json").unlink()  # timm saves none
    assert ours(load_processor(tmp_path), picture).tolist() == ours(processor, picture).tolist()


def test_transformers_opens_the_same_folder(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    model: dict[str, Any] = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "label_names": ["a", "b", "c"],
        "pretrained_cfg": {**RECORD, "crop_pct": 0.8},
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    processor, picture = load_processor(tmp_path), image(50, 38)
    save_processor(processor, tmp_path)
    stock = AutoImageProcessor.from_pretrained(tmp_path)
    made = stock(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0].numpy()
    assert float(np.abs(made - ours(processor, picture)).max()) <= ONE_STEP


def test_a_folder_of_transformers_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "vit"}')
    save_processor(make_processor(20, MEAN, STD), tmp_path)
    assert file.read_text() == '{"model_type": "vit"}'
    assert sides(load_processor(tmp_path)) == (20, 20)


def test_sides_that_vary_are_nought() -> None:
    processor = make_processor(20, MEAN, STD)
    processor.size = {"shortest_edge": 20}
    assert sides(processor) == (0, 0)


def test_a_mismatch_is_told_in_words_with_the_files_that_say_so(tmp_path: Path) -> None:
    """timm keeps its preprocessing in config.json, transformers in a file of its own."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    make_processor(8, (0.5,) * 3, (0.5,) * 3).save_pretrained(ours)
    record = {"input_size": [3, 8, 8], "crop_pct": 0.5, "mean": [0.25, 0.5, 0.5]}
    (theirs / "config.json").write_text(json.dumps({"pretrained_cfg": record}))
    data = load_digits()
    with pytest.raises(ParentError, match="prepare images differently") as caught:
        common_processor({"a": ours, "b": theirs}, data, 8)
    where = f"{ours / 'preprocessor_config.json'} and {theirs / 'config.json'}"
    assert caught.value.where == where
    got = str(caught.value.got)
    assert "size: a has height 8, width 8, b has shortest_edge 16" in got
    assert "image_mean: a has (0.5, 0.5, 0.5), b has (0.25, 0.5, 0.5)" in got
    assert "crop_size: a has nothing, b has height 8, width 8" in got
    assert "SizeDict" not in got and "None" not in got
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps({"pretrained_cfg": record}))
    with pytest.raises(ParentError, match="other images than the model takes") as caught:
        common_processor({"b": alone}, data, 16)
    assert caught.value.where == str(alone / "config.json")
