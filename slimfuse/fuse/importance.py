"""Which tokens matter at which depth, by the parents' own gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from slimfuse.families import Layout
from slimfuse.fuse import walk

FLOOR = 0.05  # of the mean: no token is dropped from a fit


def token_importance(
    models: Sequence[nn.Module],
    layouts: Sequence[Layout],
    batches: Iterable[Tensor],
    weights: Sequence[float],
) -> Tensor:
    """Return weights (depths, tokens), mean 1 at every depth, for least-squares fits of streams.

    The weight of token t at depth l is E|∂logits/∂x_lt|²_F, by one backward pass with random
    signs (Hutchinson's estimator: E over signs s of |Jᵀs|² is |J|²_F), averaged over the parents
    with their `weights`. Every depth keeps the same total; a floor of 5 % keeps tokens that
    nothing reads any more.
    """
    generator = torch.Generator().manual_seed(0)
    sums = [torch.zeros(()).double() for _ in models]
    for batch in batches:
        for i, (model, layout) in enumerate(zip(models, layouts, strict=True)):
            sums[i] = sums[i] + _gradients(model, layout, batch, generator)
    shares = [w * s / s.sum(1, keepdim=True).clamp_min(1e-30)
              for w, s in zip(weights, sums, strict=True)]  # fmt: skip
    mean = torch.stack(shares).sum(0) / sum(weights)
    return (1 - FLOOR) * mean * mean.shape[1] + FLOOR


def _gradients(
    model: nn.Module, layout: Layout, batch: Tensor, generator: torch.Generator
) -> Tensor:
    """Return Σ|∂(s·logits)/∂x|² (depths, tokens) over one batch for random signs s."""
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
    return torch.stack([g.double().square().sum(-1).sum(0) for g in grads if g is not None])
