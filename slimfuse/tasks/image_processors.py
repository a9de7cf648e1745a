"""Image processors: transformers' own, and what timm says of a model's preprocessing.

timm keeps it in config.json under `pretrained_cfg`: the image is resized to size / crop_pct, its
shortest edge (crop_mode center) or both (squash), then cut to size about its centre.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimfuse.errors import ParentError, first_line

RECORD = "pretrained_cfg"
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""PIL's numbers of timm's interpolations."""
DEFAULTS: Mapping[str, Any] = {
    "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
"""timm's own, for what a record leaves open."""


def make_processor(image_size: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Return the stock ViT processor that resizes to a square and normalises RGB."""
    return _squashing(image_size, mean, std)


def load_processor(folder: Path) -> Any:
    """Return the saved image processor of a model folder; raises ParentError.

    Of a timm model it is what config.json says, which stock tools read there, too.
    """
    from transformers import AutoImageProcessor

    record = _record(folder)
    if record is not None:
        return from_timm(record, str(folder / "config.json"))
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ParentError(
            "the image processor can't be opened",
            where=str(folder),
            got=first_line(error),
            hint="save it beside the model with processor.save_pretrained",
        ) from error


def processor_file(folder: Path) -> Path:
    """Return the file that says how a model's images are prepared: timm keeps it in config.json."""
    name = "preprocessor_config.json" if _record(folder) is None else "config.json"
    return folder / name


def shown(value: Any) -> str:
    """Return a processor's setting as words: sizes as `height 224, width 224`."""
    if hasattr(value, "items") or hasattr(value, "__dataclass_fields__"):
        return ", ".join(f"{k} {v}" for k, v in dict(value).items() if v is not None)
    if isinstance(value, list | tuple):
        return f"({', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in value)})"
    return "nothing" if value is None else str(value)


def save_processor(processor: Any, folder: Path) -> None:
    """Write preprocessor_config.json and, into a timm model's config.json, what timm needs."""
    processor.save_pretrained(folder)
    if _record(folder) is None:
        return
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[RECORD] |= to_timm(processor)
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def sides(processor: Any) -> tuple[int, int]:
    """Return height and width of the images that a processor makes, 0 where that varies."""
    cut = bool(getattr(processor, "do_center_crop", None))
    made = dict(processor.crop_size if cut else processor.size)
    return int(made.get("height", 0)), int(made.get("width", 0))


def from_timm(record: Mapping[str, Any], where: str) -> Any:
    """Return the stock processor that prepares images as timm's `pretrained_cfg` says.

    Where an odd number of rows or columns is cut off, timm may cut one more off the first side.
    Raises ParentError for preprocessing that no stock processor of one size does.
    """
    found = {**DEFAULTS, **{k: v for k, v in record.items() if v is not None}}
    channels, height, width = found.get("input_size", (3, 224, 224))
    mode, kind, share = found["crop_mode"], found["interpolation"], float(found["crop_pct"])
    if height != width or channels != 3:
        problem = f"input_size {(channels, height, width)}", "3 channels and a square"
    elif kind not in RESAMPLING:
        problem = f"interpolation {kind}", ", ".join(RESAMPLING)
    elif mode not in ("center", "squash") or not 0 < share <= 1:
        problem = f"crop_mode {mode}, crop_pct {share:g}", "center or squash, up to 1"
    else:
        resized = math.floor(height / share)
        if mode == "squash" and resized == height:
            return _squashing(height, found["mean"], found["std"], RESAMPLING[kind])
        return _cutting(resized, height, found, RESAMPLING[kind], squash=mode == "squash")
    raise ParentError(
        "the parent's preprocessing isn't known", where=where, got=problem[0], allowed=problem[1]
    )


def to_timm(processor: Any) -> dict[str, Any]:
    """Return what timm's `pretrained_cfg` says of a processor's images."""
    height, width = sides(processor)
    size, names = dict(processor.size), {v: k for k, v in RESAMPLING.items()}
    resized = size.get("shortest_edge") or size.get("height") or height
    share = height / resized if processor.do_resize else 1.0
    if math.floor(height / share) != resized:  # rounded down to the edge below
        share = height / (resized + 0.5)
    normal = bool(processor.do_normalize)
    return {
        "input_size": [3, height, width],
        "interpolation": names[int(processor.resample)],
        "crop_pct": share,
        "crop_mode": "center" if size.get("shortest_edge") else "squash",
        "mean": list(processor.image_mean) if normal else [0.0] * 3,
        "std": list(processor.image_std) if normal else [1.0] * 3,
    }


def _squashing(
    size: int, mean: Sequence[float], std: Sequence[float], resample: int | None = None
) -> Any:
    """Return the processor that resizes both edges; resample: PIL's, by default the class' own."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
        **({} if resample is None else {"resample": resample}),
    )


def _cutting(
    resized: int, size: int, record: Mapping[str, Any], resample: int, *, squash: bool
) -> Any:
    """Return the processor that resizes the shortest edge, or both, and cuts out the centre."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    edges = {"height": resized, "width": resized} if squash else {"shortest_edge": resized}
    return CLIPImageProcessorPil(
        do_convert_rgb=True,
        size=edges,
        crop_size={"height": size, "width": size},
        resample=resample,
        image_mean=list(record["mean"]),
        image_std=list(record["std"]),
    )


def _record(folder: Path) -> dict[str, Any] | None:
    """Return timm's record of a folder's model, None where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get(RECORD) if isinstance(config, dict) else None
    return found if isinstance(found, dict) else None
