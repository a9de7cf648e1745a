"""Which tokens and directions matter at which depth, by the parents' own gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimfuse.families import Layout
from slimfuse.fuse import walk

FLOOR = 0.05  # of the mean: no token is dropped from a fit
TOKENS = 16_384  # gradients settle long before that, and cost three times a forward pass
PER_BATCH = 16  # samples of one backward pass, which keeps every activation


@dataclass(frozen=True)
class Gradients:
    """Second moments of ∂logits/∂x at the checkpoints of a parent.

    tokens: E|g_lt|² (checkpoints, tokens); directions, where asked for: Σ_l E[g_l g_lᵀ] (d, d),
    every checkpoint divided by its own trace so that all count alike.
    """

    tokens: Tensor
    directions: Tensor | None


def gradients(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[Tensor],
    checkpoints: Sequence[int],
    share: float = 1.0,
    *,
    directions: bool = False,
) -> Gradients:
    """Return the gradients' second moments over a seeded draw of this share of the samples.

    One backward pass with random signs s: E over s of |Jᵀs|² is |J|²_F (Hutchinson's estimator).
    """
    generator = torch.Generator().manual_seed(0)
    tokens, outer, seen = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for part in drawn(batches, share):
        for few in part.split(PER_BATCH):
            found = _backward(model, layout, few, generator)
            kept = torch.stack([found[c] for c in checkpoints]).double()
            tokens = tokens + kept.square().sum(-1).sum(1)
            if directions:
                outer = outer + torch.einsum("cbtd,cbte->cde", kept, kept)
            seen += len(few)
    if not directions:
        return Gradients(tokens / seen, None)
    traces = outer.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)
    return Gradients(tokens / seen, (outer / traces[:, None, None]).mean(0))


def drawn(batches: Iterable[Tensor], share: float) -> Iterator[Tensor]:
    """Yield a seeded draw of about this share of every batch's samples."""
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        part = batch[torch.rand(len(batch), generator=generator) < share] if share < 1 else batch
        if len(part):
            yield part


def token_weights(found: Sequence[Gradients], weights: Sequence[float]) -> Tensor:
    """Return weights (checkpoints, tokens), mean 1 at each, for least-squares fits of streams.

    The parents' E|g|² with their shares; every checkpoint keeps the same total, and a floor of
    5 % keeps tokens that nothing reads any more.
    """
    shares = [
        w * g.tokens / g.tokens.sum(1, keepdim=True).clamp_min(1e-30)
        for w, g in zip(weights, found, strict=True)
    ]
    mean = torch.stack(shares).sum(0) / sum(weights)
    return (1 - FLOOR) * mean * mean.shape[1] + FLOOR


def all_depths_importance(
    models: Sequence[nn.Module],
    layouts: Sequence[Layout],
    batches: Callable[[], Iterable[Tensor]],
    share: float = 1.0,
) -> Tensor:
    """Return `token_weights` at every depth of models of one depth, all alike."""
    found = [
        gradients(model, layout, batches(), range(2 * len(layout.blocks) + 1), share)
        for model, layout in zip(models, layouts, strict=True)
    ]
    return token_weights(found, [1.0] * len(found))


def _backward(
    model: nn.Module, layout: Layout, batch: Tensor, generator: torch.Generator
) -> list[Tensor]:
    """Return ∂(s·logits)/∂x (batch, tokens, d) at every depth for random signs s."""
    with torch.enable_grad():
        depths = []
        for x in walk.streams(model, layout, batch):
            if not x.requires_grad:  # parents whose weights are frozen
                x.requires_grad_()
            depths.append(x)
        logits = walk.apply(model, layout.head, walk.read_out(model, layout, depths[-1]))
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        centred = logits - logits.mean(1, keepdim=True)
        found = torch.autograd.grad((centred * signs.to(logits)).sum(), depths)
    return list(found)
