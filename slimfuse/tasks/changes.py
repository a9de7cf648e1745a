"""Random changes to training pictures, as timm makes them, drawn by torch's generator alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimfuse.batch import Batch

RAND_AUGMENT = "rand-m7-n2-mstd0.5-inc1"  # as DeiT's, a little weaker: models here are small
ERASE = 0.25
"""The share of pictures that lose a rectangle."""


@contextmanager
def steered() -> Iterator[None]:
    """Let python's and numpy's generators follow torch's, so that a step can be made again."""
    before = random.getstate(), np.random.get_state()
    seed = int(torch.randint(2**31, ()))
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def rand_augment(images: list[Any]) -> list[Any]:
    """Return pictures (height, width, 3) uint8 changed by RandAugment (Cubuk et al. 2019)."""
    from PIL import Image

    change = _rand_augment()
    with steered():
        return [np.asarray(change(Image.fromarray(image))) for image in images]


@cache
def _rand_augment() -> Any:
    from timm.data.auto_augment import rand_augment_transform

    return rand_augment_transform(RAND_AUGMENT, {})


def erase(pixels: Tensor) -> Tensor:
    """Return pictures (n, 3, h, w) of which a quarter lost a rectangle (Zhong et al. 2017)."""
    from timm.data.random_erasing import RandomErasing

    eraser = RandomErasing(probability=ERASE, mode="pixel", device=str(pixels.device))
    with steered():
        found: Tensor = eraser(pixels.clone())
    return found


def mixing(
    mixup: float, cutmix: float, classes: int
) -> Callable[[Batch, Tensor], tuple[Batch, Tensor]]:
    """Return what blends the pictures of a batch in pairs, and their labels to shares (n, classes).

    mixup, cutmix: alpha of each (Zhang et al. 2018, Yun et al. 2019); one of both at random where
    both are given. Of an odd batch the last picture stays.
    """
    from timm.data.mixup import Mixup

    blend = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=classes)

    def mix(inputs: Batch, labels: Tensor) -> tuple[Batch, Tensor]:
        ((name, pixels),) = inputs.arguments.items()
        even = len(labels) // 2 * 2
        shares = torch.nn.functional.one_hot(labels, classes).float()
        if even:
            with steered():
                mixed, told = blend(pixels[:even].clone(), labels[:even])
            pixels = torch.cat([mixed, pixels[even:]])
            shares = torch.cat([told.float(), shares[even:]])
        return Batch({name: pixels}), shares

    return mix
