"""A tiny model and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import shake, vit_config
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.families import ViT
from slimfuse.finetune import loop
from slimfuse.finetune.distill import labels_loss
from slimfuse.finetune.loop import fit
from slimfuse.finetune.schedule import Schedule
from slimfuse.tasks import ImageClassification

SAMPLES, STEPS = 23, 9
TASK = ImageClassification()


def model() -> Any:
    # dropout, so that the random numbers of a step matter
    config = vit_config(
        hidden_size=6, num_attention_heads=2, intermediate_size=7, num_hidden_layers=1,
        hidden_dropout_prob=0.2,
    )  # fmt: skip
    return shake(ViT().build(config), seed=0)


def inputs() -> Tensor:
    return torch.randn(SAMPLES, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def labels() -> Tensor:
    return torch.arange(SAMPLES) % 7


def learn() -> loop.Loss:
    x = inputs()
    # noise from the global generator, as augmentation draws it
    return labels_loss(
        TASK, lambda i: (pixels(x[i] + 0.1 * torch.randn(len(i), 3, 6, 6)), labels()[i])
    )


def train(
    net: nn.Module,
    loss: loop.Loss,
    folder: Path,
    ema: float | None,
    precision: loop.Precision = "fp32",
) -> list[float]:
    folder.mkdir(exist_ok=True)
    return fit(
        net,
        loss,
        SAMPLES,
        Schedule(steps=STEPS, batch_size=5, lr=1e-2, ema=ema, seed=3),
        precision=precision,
        checkpoint=folder / "train.safetensors",
        what="testing",
    ).losses


def pixels(values: Tensor) -> Batch:
    return Batch({"pixel_values": values})
