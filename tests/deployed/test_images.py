"""Without transformers images are prepared as its processors do it, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from slimfuse_export.deployed import describe, read_preparation
from transformers import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from slimfuse.tasks.image_processors import load_processor

SQUARE, ODD = {"height": 9, "width": 9}, {"height": 22, "width": 21}
PROCESSORS: dict[str, Any] = {
    "vit": ViTImageProcessorPil(size={"height": 28, "width": 20}),
    "vit-plain": ViTImageProcessorPil(size=SQUARE, do_normalize=False, resample=3),
    "vit-only-normalised": ViTImageProcessorPil(size=SQUARE, do_rescale=False),
    "deit": DeiTImageProcessorPil(size={"height": 33, "width": 31}, crop_size=SQUARE),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 21}, crop_size=SQUARE),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 30}, crop_size=ODD),
    "cut-only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 40, "width": 12}),
    "lanczos": ViTImageProcessorPil(size=SQUARE, resample=1, image_mean=[0.1, 0.2, 0.3]),
}  # fmt: skip
SIZES = ((37, 23), (8, 8), (15, 60), (1, 1))


def images(mode: str) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]
    return [Image.fromarray(array).convert(mode) for array in noise]


def ours(folder: Path, image: Image.Image) -> Any:
    told = describe(folder, ["pixel_values"], ["logits"])
    return read_preparation(told, 3)(image)


def write_config(folder: Path, **content: Any) -> None:
    config = {"architectures": ["ViTForImageClassification"], **content}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "CMYK", "1"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(name: str, mode: str, tmp_path: Path) -> None:
    processor = PROCESSORS[name]
    processor.do_convert_rgb = True
    processor.save_pretrained(tmp_path)
    write_config(tmp_path)
    opened = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for image in images(mode):
        (wanted,) = opened(images=[image], return_tensors="np")["pixel_values"]
        found = ours(tmp_path, image)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)  # the same operations in the same order


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", None])
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("share", [1.0, 0.875, 0.9])
def test_pixels_are_those_of_timms_record(
    interpolation: str | None, mode: str, share: float, tmp_path: Path
) -> None:
    record = {"input_size": [3, 20, 20], "crop_pct": share, "crop_mode": mode,
              "interpolation": interpolation, "mean": [0.3, 0.4, 0.5]}  # fmt: skip
    write_config(tmp_path, pretrained_cfg=record)
    processor = load_processor(tmp_path)
    for image in images("RGB"):
        (wanted,) = processor(images=[image], return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(ours(tmp_path, image), wanted)


def test_one_channel_is_grey(tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(size=SQUARE, image_mean=[0.5], image_std=[0.25])
    processor.save_pretrained(tmp_path)
    write_config(tmp_path)
    told = describe(tmp_path, ["pixel_values"], ["logits"])
    for image in images("L"):
        (wanted,) = processor(images=[image], return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(read_preparation(told, 1)(image), wanted)
