"""Which tokens matter at which depth, by the parents' own gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimfuse.families import Layout
from slimfuse.fuse import walk

FLOOR = 0.05  # of the mean: no token is dropped from a fit
BATCHES = 4  # the average over tokens settles within a few hundred samples


def token_importance(
    models: Iterable[nn.Module], layouts: Iterable[Layout], batches: Iterable[Tensor]
) -> Tensor:
    """Return weights (depths, tokens), mean 1 at every depth, for least-squares fits of streams.

    The weight of token t at depth l is E|∂logits/∂x_lt|²_F, by one backward pass with random
    signs (Hutchinson's estimator: E over signs s of |Jᵀs|² is |J|²_F), averaged over the parents.
    Every depth keeps the same total; a floor of 5 % keeps tokens that nothing reads any more.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = list(zip(models, layouts, strict=True))
    totals: list[Tensor] = []
    for _, batch in zip(range(BATCHES), batches, strict=False):
        for model, layout in pairs:
            squares = _gradients(model, layout, batch, generator)
            totals.append(squares / squares.sum(1, keepdim=True).clamp_min(1e-30))
    mean = torch.stack(totals).mean(0) * totals[0].shape[1]
    return (1 - FLOOR) * mean + FLOOR


def _gradients(
    model: nn.Module, layout: Layout, batch: Tensor, generator: torch.Generator
) -> Tensor:
    """Return E|∂(s·logits)/∂x|² (depths, tokens) of one batch for random signs s."""
    with torch.enable_grad():
        depths = []
        for x in walk.streams(model, layout, batch):
            if not x.requires_grad:  # parents whose weights are frozen
                x.requires_grad_()
            x.retain_grad()
            depths.append(x)
        logits = walk.apply(model, layout.head, walk.read_out(model, layout, depths[-1]))
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        centred = logits - logits.mean(1, keepdim=True)
        (centred * signs.to(logits)).sum().backward()
    model.zero_grad(set_to_none=True)
    grads = [x.grad for x in depths]
    return torch.stack([g.double().square().sum(-1).mean(0) for g in grads if g is not None])
