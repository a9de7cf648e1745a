"""Which tokens and directions matter at which depth, by the parents' own gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs, token_mask
from slimfuse.families import Layout
from slimfuse.fuse import walk
from slimfuse.fuse.solve import roots
from slimfuse.fuse.tables import centred_gram

FLOOR = 0.05  # of the mean: no token is dropped from a fit
TOKENS = 16_384  # gradients settle long before that, and cost three times a forward pass
PER_BATCH = 16  # samples of one backward pass, which keeps every activation …
PER_PASS = 256  # … or of a head that reads every token, tokens


@dataclass(frozen=True)
class Gradients:
    """Second moments of ∂logits/∂x at the checkpoints of a parent; without a head see `_backward`.

    tokens: E|g_lt|² (checkpoints, tokens), under RMSNorm E|g_lt|²|x_lt|², of errors in proportion
    to the stream; directions, where asked for: Σ_l E[g_l g_lᵀ] (d, d), every checkpoint divided by
    its own trace so that all count alike.
    """

    tokens: Tensor
    directions: Tensor | None


def gradients(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[Inputs],
    checkpoints: Sequence[int],
    share: float = 1.0,
    *,
    directions: bool = False,
) -> Gradients:
    """Return the gradients' second moments over a seeded draw of this share of the samples.

    Means over the samples whose token at a place is real.

    One backward pass with random signs s: E over s of |Jᵀs|² is |J|²_F (Hutchinson's estimator).
    Of a head that reads every token, Wᵀs of the centred weight W is drawn as a normal vector of its
    covariance WᵀW, so that no logit is made: over a vocabulary of signs it is one.
    """
    generator = torch.Generator().manual_seed(0)
    root = _head_root(model, layout) if layout.readout == "all" else None
    tokens, outer, seen = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for part in drawn(batches, share):
        for few in part.split(PER_BATCH if root is None else max(1, PER_PASS // _length(part))):
            streams, found = _backward(model, layout, few, generator, root)
            kept = [found[c].double() for c in checkpoints]
            squares = [g.square().sum(-1) for g in kept]
            if layout.norm == "rms":
                sizes = [streams[c].detach().double().square().sum(-1) for c in checkpoints]
                squares = [g * x for g, x in zip(squares, sizes, strict=True)]
            tokens = tokens + torch.stack([x.sum(0) for x in squares])
            if directions:
                outer = outer + torch.stack([torch.einsum("btd,bte->de", g, g) for g in kept])
            mask = token_mask(few)
            seen = seen + (len(few) if mask is None else mask.sum(0))
    tokens = tokens / seen.clamp_min(1)
    if not directions:
        return Gradients(tokens, None)
    traces = outer.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)
    return Gradients(tokens, (outer / traces[:, None, None]).mean(0))


def drawn(batches: Iterable[Inputs], share: float) -> Iterator[Inputs]:
    """Yield a seeded draw of about this share of every batch's samples."""
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        part = batch[torch.rand(len(batch), generator=generator) < share] if share < 1 else batch
        if len(part):
            yield part


def token_weights(found: Sequence[Gradients], weights: Sequence[float]) -> Tensor:
    """Return weights (checkpoints, tokens), mean 1 at each, for least-squares fits of streams.

    The parents' `Gradients.tokens` with their shares; every checkpoint keeps the same total, and
    a floor of 5 % keeps tokens that nothing reads any more.
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
    batches: Callable[[], Iterable[Inputs]],
    share: float = 1.0,
) -> Tensor:
    """Return `token_weights` at every depth of models of one depth, all alike."""
    found = [
        gradients(model, layout, batches(), range(2 * len(layout.blocks) + 1), share)
        for model, layout in zip(models, layouts, strict=True)
    ]
    return token_weights(found, [1.0] * len(found))


def _length(inputs: Inputs) -> int:
    """Return how many tokens a sample has."""
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.arguments.values()))
    return int(first.shape[1])


def _head_root(model: nn.Module, layout: Layout) -> Tensor:
    """Return (WᵀW)^½ (d, d) of the head's weight W (classes, d), its mean row removed."""
    weight = model.get_parameter(f"{layout.head}.weight").detach()
    return roots(centred_gram([weight]))[0].to(weight.dtype)


def _backward(
    model: nn.Module,
    layout: Layout,
    batch: Inputs,
    generator: torch.Generator,
    root: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the streams and ∂(s·logits)/∂x (batch, tokens, d) at every depth, s random signs.

    root: as of `_head_root`, for Wᵀs in their place. A model without a head is asked for its
    pooled features f in the place of logits, as f / |f|: what cosine similarities are made of.
    """
    with torch.enable_grad():
        depths = []
        for x in walk.streams(model, layout, batch):
            if not x.requires_grad:  # parents whose weights are frozen
                x.requires_grad_()
            depths.append(x)
        top = walk.read_out(model, layout, depths[-1], token_mask(batch))
        if root is None:
            if layout.head:
                logits = walk.apply(model, layout.head, top)
            else:
                logits = nn.functional.normalize(top, dim=1)
            signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
            centred = logits - logits.mean(1, keepdim=True) if layout.head else logits
            total = (centred * signs.to(logits)).sum()
        else:
            normal = torch.randn(top.shape, generator=generator, dtype=top.dtype)
            total = (top * (normal @ root)).sum()
        found = torch.autograd.grad(total, depths)
    return depths, list(found)
