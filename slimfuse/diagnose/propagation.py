"""How a signal goes through a transformer: tokens that become alike, branches beside the stream.

Averaging attention makes tokens alike with depth, and where all are equal the gradients of queries
and keys are exactly zero. Healthy classifiers reach cosines of .93 in their last layer, so a child
is compared with its parent, never with a constant.
Source: arXiv 2206.03126; diagnostics.md §6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import token_mask
from slimfuse.diagnose.answers import Kind, Labelled, Read, flat
from slimfuse.diagnose.probing import Patience, only, probe
from slimfuse.families import Layout


@dataclass(frozen=True)
class Signal:
    """What a block does to the stream, means over samples.

    cosine: of two tokens of a sample, behind the block; stable_rank: ‖X‖_F²/‖X‖₂² of its tokens
    there; attention, mlp: norm of what a branch adds over that of the stream before the block;
    score_share: gradients' norm of queries and keys over that of values.
    """

    cosine: float
    stable_rank: float
    attention: float
    mlp: float
    score_share: float


def uniform_cosine(depth: int, alpha: float, sigma: float, tokens: int) -> float:
    """Return the expected cosine of two tokens behind layers of uniform attention.

    Of orthogonal tokens, x + α W mean(x) with W of independent entries of variance σ²/width:
    ρ = u/(1 + u), u = ((1 + α²σ²)^L - 1)/T. depth: L; tokens: T. With α = 1 it goes to 1
    with depth, with α = 1/√L it stays.
    """
    u = ((1 + alpha**2 * sigma**2) ** depth - 1) / tokens
    return u / (1 + u)


def token_cosine(stream: Tensor) -> Tensor:
    """Return the mean cosine of two different tokens of each sample (samples,).

    stream: (samples, tokens, width), at least two tokens.
    """
    unit = nn.functional.normalize(stream.double(), dim=-1)
    tokens = stream.shape[1]
    total = unit.sum(1).square().sum(1) - unit.square().sum((1, 2))
    return total / (tokens * (tokens - 1))


def stable_rank(stream: Tensor) -> Tensor:
    """Return ‖X‖_F²/‖X‖₂² of each sample's tokens (samples,)."""
    values = torch.linalg.svdvals(stream.double())
    found: Tensor = values.square().sum(1) / values[:, 0].square().clamp_min(1e-300)
    return found


def signals(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[Labelled],
    kind: Kind,
    read: Read = flat,
    *,
    seed: int = 0,
    patience: Patience | None = None,
) -> tuple[list[Signal], int]:
    """Return what every block does, and on how many samples that was seen.

    Of texts only the tokens that all of a batch have count. Cost: one forward and backward pass.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(len(layout.blocks), 4, dtype=torch.float64)
    paths = [(b.q, b.k, b.v) for b in layout.blocks]
    weights = [
        [model.get_submodule(p).get_parameter("weight") for p in dict.fromkeys(three)]
        for three in paths
    ]
    asked = [w for own in weights for w in own]
    squares = [torch.zeros(w.shape[_out(model, layout)], dtype=torch.float64) for w in asked]
    count = 0
    for given in (patience or Patience()).over(batches):
        with _watched(model, layout) as seen, only(model, asked), torch.enable_grad():
            value = probe(model, given, kind, generator, read)
            slopes = torch.autograd.grad(value, asked, allow_unused=True)
        mask, n = token_mask(given[0]), len(given[0])
        count += n
        for i, block in enumerate(layout.blocks):
            before, after = seen[f"{block.path}<"], seen[f"{block.path}>"]
            length = after.shape[1] if mask is None else max(2, int(mask.sum(1).min()))
            stream = after[:, :length]
            size = before.norm().clamp_min(1e-30)
            row = (
                float(token_cosine(stream).sum()), float(stable_rank(stream).sum()),
                n * float(seen[f"{block.o}>"].norm() / size),
                n * float(seen[f"{block.down}>"].norm() / size),
            )  # fmt: skip
            sums[i] += torch.tensor(row, dtype=torch.float64)
        for total, slope in zip(squares, slopes, strict=True):
            if slope is not None:
                axis = 1 - _out(model, layout)
                total += slope.double().square().sum(axis).cpu()
    means, place, found = sums / count, 0, []
    for row, own in zip(means.tolist(), weights, strict=True):
        parts = squares[place : place + len(own)]
        place += len(own)
        if len(parts) == 1:  # one layer makes all three
            third = len(parts[0]) // 3
            parts = list(parts[0].split([third, third, len(parts[0]) - 2 * third]))
        q, k, v = (float(p.sum()) for p in parts)
        cosine, rank, attention, mlp = row
        share = ((q + k) / max(v, 1e-300)) ** 0.5
        found.append(Signal(cosine, rank, attention, mlp, share))
    return found, count


def _out(model: nn.Module, layout: Layout) -> int:
    """Return the axis of a weight that its layer writes: GPT-2's are the other way round."""
    from transformers.pytorch_utils import Conv1D

    return 1 if isinstance(model.get_submodule(layout.blocks[0].q), Conv1D) else 0


@contextmanager
def _watched(model: nn.Module, layout: Layout) -> Iterator[dict[str, Tensor]]:
    """Yield what goes into blocks and comes out of them and of their branches."""
    seen: dict[str, Tensor] = {}

    def into(name: str) -> Callable[..., None]:
        def observe(_module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            x = given[0] if given else named["hidden_states"]
            seen[f"{name}<"] = x.detach()

        return observe

    def out(name: str) -> Callable[..., None]:
        def observe(_module: nn.Module, _given: object, found: Any) -> None:
            seen[f"{name}>"] = (found[0] if isinstance(found, tuple) else found).detach()

        return observe

    handles = []
    for block in layout.blocks:
        home = model.get_submodule(block.path)
        handles.append(home.register_forward_pre_hook(into(block.path), with_kwargs=True))
        for path in (block.path, block.o, block.down):
            handles.append(model.get_submodule(path).register_forward_hook(out(path)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
