"""Losses of single samples: against labels (empirical Fisher) or the model's own (true Fisher)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs, token_mask
from slimfuse.errors import UserError
from slimfuse.saliency.units import Loss

DRAWN = 1 << 22  # probabilities of one draw, which float64 holds
IGNORED = -100  # a label that doesn't count, as in torch


def against_labels(output: Any, inputs: Inputs, labels: Tensor | None) -> Tensor:
    """Return −log p(labels) (samples,): classes, several labels at once (float), or a number.

    Of logits for every token it is the sum over those whose label counts; with a causal model
    labels are those of the same places: shift them before. A number's error is half its square.
    """
    if labels is None:
        raise UserError("the loss needs labels and the batches have none", where="saliency")
    z = logits_of(output)
    if not labels.is_floating_point():
        return _categorical(z, labels)
    if z.ndim == 2 and z.shape[1] == 1:
        return (z[:, 0] - labels.reshape(-1).to(z)).square() / 2
    each = nn.functional.binary_cross_entropy_with_logits(z, labels.to(z), reduction="none")
    return each.flatten(1).sum(1)


class OwnAnswers:
    """Losses against labels that are drawn from the model's own answers: its true Fisher.

    E over y ~ p(y|x) of ∇log p ∇log pᵀ needs no labels (Martens 2020, arXiv 1412.1193, §5).
    Classes are drawn from the softmax, of every real token where there are logits for each;
    several labels (`several`) from their sigmoids; a number from a normal of variance 1.
    Without a head see `features`.
    """

    def __init__(self, seed: int = 0, *, several: bool = False) -> None:
        self.several, self.seed = several, seed
        self.restart()

    def restart(self) -> None:
        """Begin the draws from the seed."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, output: Any, inputs: Inputs, labels: Tensor | None) -> Tensor:
        """Return −log p of one drawn answer a sample (samples,); labels aren't looked at."""
        z = logits_of(output)
        rows = z.detach().flatten(0, -2)
        if self.several:
            shares = rows.double().cpu().sigmoid()
            drawn = torch.bernoulli(shares, generator=self.generator).view(z.shape).to(z)
            each = nn.functional.binary_cross_entropy_with_logits(z, drawn, reduction="none")
            return each.flatten(1).sum(1)
        if z.shape[-1] == 1:
            noise = torch.randn(z.shape, generator=self.generator, dtype=torch.float64)
            return (noise.to(z) * z).flatten(1).sum(1)
        few = max(1, DRAWN // rows.shape[1])
        picked = torch.cat([self._pick(part) for part in rows.split(few)]).view(z.shape[:-1])
        mask = token_mask(inputs)
        if z.ndim == 3 and mask is not None:
            picked = picked.masked_fill(~mask.cpu(), IGNORED)
        return _categorical(z, picked)

    def _pick(self, rows: Tensor) -> Tensor:
        """Return one class a row (n,), drawn from the softmax of its logits."""
        shares = rows.double().cpu().softmax(-1)
        return torch.multinomial(shares, 1, generator=self.generator)[:, 0]


class Features:
    """Losses of a model without a head: random signs times its unit features, s · f / |f|.

    E over s of ∇(s·f)∇(s·f)ᵀ is JᵀJ of the features that cosines are made of (Hutchinson).
    read: takes what the model returned, and the inputs, to features (samples, d).
    """

    def __init__(self, read: Callable[[Any, Inputs], Tensor], seed: int = 0) -> None:
        self.read, self.seed = read, seed
        self.restart()

    def restart(self) -> None:
        """Begin the signs from the seed."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, output: Any, inputs: Inputs, labels: Tensor | None) -> Tensor:
        """Return s · f / |f| (samples,)."""
        unit = nn.functional.normalize(self.read(output, inputs), dim=1)
        signs = torch.randint(0, 2, unit.shape, generator=self.generator) * 2 - 1
        return (signs.to(unit) * unit).sum(1)


def own_answers(seed: int = 0, *, several: bool = False) -> Loss:
    """Return losses against answers drawn from the model, see `OwnAnswers`."""
    return OwnAnswers(seed, several=several)


def logits_of(output: Any) -> Tensor:
    """Return a model's logits (samples, …): its output, or what that calls `logits`."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise UserError(
            "the model gives no logits to be scored by",
            where="saliency",
            got=type(output).__name__,
            hint="give a loss of its own, as `Features`",
        )
    return found


def _categorical(z: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropies (samples,), summed over a sample's tokens."""
    flat = labels.to(z.device).reshape(-1)
    each = nn.functional.cross_entropy(
        z.reshape(-1, z.shape[-1]), flat, reduction="none", ignore_index=IGNORED
    )
    return each.view(len(z), -1).sum(1)
