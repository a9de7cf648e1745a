"""Images as a model wants them, prepared as the saved processor does it in transformers.

The steps and their arithmetic are those of transformers' Pillow processors, with which slimfuse
trains: resize in 8 bits, cut the centre out, scale in float64, round to float32, normalise.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from slimfuse_export.deployed.description import Description, read_json
from slimfuse_export.errors import ExportError
from slimfuse_export.sessions import first_line

PROCESSOR = "preprocessor_config.json"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded: formats that people send, of Pillow's many parsers."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MOST_PIXELS = 40_000_000  # decoded they take 120 MB
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
_BILINEAR = 2
_TIMM: Mapping[str, Any] = {
    "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
"""timm's own, for what a record leaves open."""
_IGNORED = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class ImagePreparation:
    """The steps from an image to pixels (channels, height, width); None leaves a step out.

    mode: Pillow's, RGB or L. size: height and width, or the shortest edge alone. resample:
    Pillow's number of the filter. crop: height and width cut out about the centre, zeros around
    images that are smaller. scale: factor of the 8-bit values. mean, std: of each channel.
    """

    mode: str = "RGB"
    size: tuple[int, int] | int | None = None
    resample: int = _BILINEAR
    crop: tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Return the pixels; raises ExportError where resizing would make too many of them."""
        image = image if image.mode == self.mode else image.convert(self.mode)
        if self.size is not None:
            height, width = self._resized(image)
            if height * width > MOST_PIXELS:
                raise ExportError(
                    "the image is too narrow to be resized",
                    got=f"{image.width} × {image.height}, resized {width} × {height}",
                    allowed=f"{MOST_PIXELS:,} pixels",
                )
            image = image.resize((width, height), resample=Image.Resampling(self.resample))
        pixels: NDArray[Any] = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if self.crop is not None:
            pixels = _cut(pixels, self.crop)
        if self.scale is not None:
            pixels = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        pixels = pixels.astype(np.float32, copy=False)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        if not isinstance(self.size, int):
            assert self.size is not None
            return self.size
        short, long = sorted(image.size)
        other = int(self.size * long / short)
        return (other, self.size) if image.width <= image.height else (self.size, other)


def _cut(pixels: NDArray[Any], crop: tuple[int, int]) -> NDArray[Any]:
    """Return the centre (channels, *crop) of an image, which gets zeros around where it's small.

    Where an odd number of rows is cut off, the smaller half goes first; where zeros are put
    around, the larger one.
    """
    height, width = crop
    missing = [max(0, want - have) for want, have in zip(crop, pixels.shape[1:], strict=True)]
    if any(missing):
        around = [(math.ceil(n / 2), n // 2) for n in missing]
        pixels = np.pad(pixels, [(0, 0), *around])
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def open_image(source: bytes | Path, *, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Return a decoded image, the first of several, turned as its EXIF record says.

    source: the file's content, or its path. most_pixels: more are refused before decoding.
    Raises: ExportError for whatever can't be read, decoded, or is too large.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source,
                        formats=FORMATS) as image:  # fmt: skip
            if image.width * image.height > most_pixels:
                raise ExportError(
                    "the image has too many pixels",
                    got=f"{image.width} × {image.height}",
                    allowed=f"{most_pixels:,} pixels",
                )
            image.load()
            found: Image.Image = ImageOps.exif_transpose(image)
            return found if found is not image else image.copy()
    except ExportError:
        raise
    except Image.DecompressionBombError as error:
        raise ExportError(
            "the image has too many pixels", got=first_line(error), allowed=f"{most_pixels:,}"
        ) from error
    except FileNotFoundError as error:
        raise ExportError("the image does not exist") from error
    except UnidentifiedImageError as error:
        raise ExportError("the file is no image", allowed=", ".join(FORMATS)) from error
    except Exception as error:  # decoders of damaged files raise anything
        raise ExportError("the image can't be decoded", got=first_line(error)) from error


def read_preparation(description: Description, channels: int) -> ImagePreparation:
    """Return how a folder's images are prepared.

    channels: of the graph's input: 3 for RGB, 1 for grey. Of a timm model its record in
    config.json counts, of others preprocessor_config.json.
    Raises: ExportError for settings that aren't known.
    """
    if channels not in (1, 3):
        raise ExportError("the model wants images of other channels", got=channels, allowed="1, 3")
    mode = "RGB" if channels == 3 else "L"
    if description.timm is not None:
        return _of_timm(description.timm, mode)
    where = description.folder / PROCESSOR
    return _of_transformers(read_json(where), mode, where)


def _of_transformers(told: Mapping[str, Any], mode: str, where: Path) -> ImagePreparation:
    odd = [k for k, v in told.items() if k.startswith("do_") and v and k not in _IGNORED]
    if odd:
        raise ExportError(
            "the image processor does what isn't known here",
            where=where,
            got=", ".join(sorted(odd)),
            allowed=", ".join(_IGNORED),
        )
    size, crop = told.get("size"), _edges(told.get("crop_size"))
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    only = isinstance(size, dict) and not size.get("longest_edge")
    wanted = edge if isinstance(edge, int) and only else _edges(size)
    resize, cut, rescale, normalise = (
        bool(told.get(key)) for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    )
    resample = told.get("resample")
    mean, std = _floats(told.get("image_mean")), _floats(told.get("image_std"))
    scale = told.get("rescale_factor", 1 / 255)
    gaps = {
        "size": resize and wanted is None,
        "crop_size": cut and crop is None,
        "resample": resize and resample is not None and resample not in _RESAMPLING.values(),
        "image_mean, image_std": normalise and not (mean and std),
        "rescale_factor": rescale and not isinstance(scale, int | float),
    }
    if any(gaps.values()):
        raise ExportError(
            "the image processor's settings aren't known",
            where=where,
            got=", ".join(f"{key}: {told.get(key)}" for key, gap in gaps.items() if gap),
        )
    channels = 3 if mode == "RGB" else 1
    return ImagePreparation(
        mode,
        size=wanted if resize else None,
        resample=_BILINEAR if resample is None else resample,
        crop=crop if cut else None,
        scale=scale if rescale else None,
        mean=_spread(mean, channels, where) if normalise else None,
        std=_spread(std, channels, where) if normalise else None,
    )


def _of_timm(record: Mapping[str, Any], mode: str) -> ImagePreparation:
    """Return what timm's record says: resize to size / crop_pct, then cut the centre out."""
    found = {**_TIMM, **{k: v for k, v in record.items() if v is not None}}
    _, height, width = found.get("input_size", (3, 224, 224))
    crop_mode, kind, share = found["crop_mode"], found["interpolation"], float(found["crop_pct"])
    if kind not in _RESAMPLING or crop_mode not in ("center", "squash") or not 0 < share <= 1:
        raise ExportError(
            "the preprocessing isn't known",
            where="config.json: pretrained_cfg",
            got=f"interpolation {kind}, crop_mode {crop_mode}, crop_pct {share:g}",
            allowed=f"{', '.join(_RESAMPLING)}; center or squash; up to 1",
        )
    if height != width:
        raise ExportError("images that aren't square aren't known of timm", got=(height, width))
    edge = math.floor(height / share)
    return ImagePreparation(
        mode,
        size=edge if crop_mode == "center" else (edge, edge),
        resample=_RESAMPLING[kind],
        crop=(height, width),
        scale=1 / 255,
        mean=_floats(found["mean"]),
        std=_floats(found["std"]),
    )


def _edges(value: object) -> tuple[int, int] | None:
    if not isinstance(value, dict):
        return None
    height, width = value.get("height"), value.get("width")
    whole = isinstance(height, int) and isinstance(width, int) and height > 0 < width
    return (height, width) if whole else None  # type: ignore[return-value]


def _floats(value: object) -> tuple[float, ...] | None:
    values = list(value) if isinstance(value, list | tuple) else [value]
    found = tuple(float(v) for v in values if isinstance(v, int | float))
    return found if found and len(found) == len(values) else None


def _spread(values: tuple[float, ...] | None, channels: int, where: Path) -> tuple[float, ...]:
    assert values is not None
    if len(values) not in (1, channels):
        raise ExportError(
            "the image processor is for images of other channels",
            where=where,
            got=f"{len(values)} means",
            allowed=channels,
        )
    return values * (channels if len(values) == 1 else 1)
