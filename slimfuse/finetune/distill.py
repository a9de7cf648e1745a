"""What a training step minimises: labels, the teachers' soft targets, or a mix of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, call

Fetch = Callable[[Tensor], Batch]
"""Sample indices (batch,) -> model inputs."""


def soft_targets(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Return the teachers' weighted mean probabilities (n, classes) at `temperature`."""
    total = sum(weights)
    parts = [
        (w / total) * torch.softmax(z.float() / temperature, -1)
        for w, z in zip(weights, logits, strict=True)
    ]
    return torch.stack(parts).sum(0)


def labels_loss(
    fetch: Fetch, labels: Tensor, label_smoothing: float = 0.0
) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return cross-entropy against labels (n,) as a loss of (model, indices)."""

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        like = next(model.parameters())
        scores = call(model, fetch(indices).to(like.device, like.dtype)).logits
        return nn.functional.cross_entropy(
            scores.float(), labels[indices].to(like.device), label_smoothing=label_smoothing
        )

    return loss


def distillation_loss(
    fetch: Fetch,
    labels: Tensor,
    teach: Callable[[Tensor, Batch], Tensor],
    *,
    temperature: float,
    hardness: float,
) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return `hardness`·T²·KL(teachers ‖ model) + (1 - `hardness`)·cross-entropy.

    teach: (indices, inputs) -> soft targets (batch, classes) at `temperature`.
    The factor T² keeps the gradient's size independent of T.
    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        inputs, like = fetch(indices), next(model.parameters())
        device = like.device
        scores = call(model, inputs.to(device, like.dtype)).logits.float()
        soft = nn.functional.kl_div(
            torch.log_softmax(scores / temperature, -1),
            teach(indices, inputs).to(device),
            reduction="batchmean",
        )
        hard = nn.functional.cross_entropy(scores, labels[indices].to(device))
        return hardness * temperature**2 * soft + (1 - hardness) * hard

    return loss
