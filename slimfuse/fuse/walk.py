"""Run a transformer block by block, keeping only its residual streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs, call, token_mask
from slimfuse.families import Block, Layout

CACHES = ("past_key_values", "past_key_value", "layer_past")


class _ReachedError(Exception):
    """A forward pass has come as far as it was wanted."""


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the stream: masks, positions, flags."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Start:
    """A batch before the first block.

    stream: (batch, tokens, d); calls: one a block; mask: real tokens (batch, tokens), None where
    all are.
    """

    stream: Tensor
    calls: tuple[Call, ...]
    mask: Tensor | None


@contextmanager
def watch(model: nn.Module, **paths: str) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds the latest first input of the modules at `paths`, by its name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(keep(name))
        for name, path in paths.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def start(model: nn.Module, layout: Layout, inputs: Inputs) -> Start:
    """Run a model up to its blocks, which only tell what they are called with."""
    found: list[tuple[Tensor, Call]] = []
    last = len(layout.blocks)

    def tell(stream: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        stream = stream[0] if isinstance(stream, tuple) else stream
        told = {name: None if name in CACHES else value for name, value in kwargs.items()}
        found.append((stream, Call(args, told)))
        if len(found) == last:
            raise _ReachedError
        return (stream,)  # some models take their blocks' first output, the others hand it on

    with ExitStack() as stack:
        for block in layout.blocks:
            stack.enter_context(_instead(model.get_submodule(block.path), tell))
        with suppress(_ReachedError):
            call(model, inputs)
    return Start(found[0][0], tuple(told for _, told in found), token_mask(inputs))


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module do something else for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def start_sum(model: nn.Module, layout: Layout, inputs: Inputs) -> tuple[Start, Tensor]:
    """Return a post-norm model's start and what its first norm sees: the embeddings' sum."""
    with watch(model, total=layout.embed_norm) as seen:
        found = start(model, layout, inputs)
    return found, seen["total"]


def reading(model: nn.Module, block: Block, norm: str, stream: Tensor) -> Tensor:
    """Return what a branch reads: a pre-norm stream behind its norm, a post-norm one as it is."""
    return apply(model, norm, stream) if block.norm_order == "pre" else stream


def landed(model: nn.Module, block: Block, norm: str, total: Tensor) -> Tensor:
    """Return the stream that a sum with a branch becomes: itself, or what its norm makes of it."""
    return total if block.norm_order == "pre" else apply(model, norm, total)


def norm_scale(norm: nn.Module, total: Tensor) -> Tensor:
    """Return √(variance over channels + ε) (…, 1): what a LayerNorm divides by."""
    assert isinstance(norm, nn.LayerNorm), f"a post-norm stream leaves {type(norm).__name__}"
    return (total.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()


def root_mean_square(norm: nn.Module, x: Tensor) -> Tensor:
    """Return √(mean square of channels + ε) (…, 1): what an RMSNorm divides by."""
    assert isinstance(norm.eps, float), f"{type(norm).__name__} tells no epsilon"
    return (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def attend(model: nn.Module, block: Block, stream: Tensor, told: Call) -> Tensor:
    """Return the heads' outputs (batch, tokens, heads·units), before the output projection."""
    caught: list[Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _ReachedError

    handle = model.get_submodule(block.o).register_forward_pre_hook(hook)
    try:
        model.get_submodule(block.path)(stream, *told.args, **(told.kwargs or {}))
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return caught[0]


def apply(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """Return what the module at `path` makes of x."""
    out: Tensor = model.get_submodule(path)(x)
    return out


def pooled(layout: Layout, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows (n, d) of a stream (batch, tokens, d) that the head reads.

    A number is a token's place; last: each sequence's last real token; mean: over its real tokens
    behind the layout's prefix; all: every real token is a row; first+mean: the first token beside
    the mean of the others.
    """
    if isinstance(layout.readout, int):
        return x[:, layout.readout]
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if layout.readout == "all":
        return x[mask]
    if layout.readout == "last":
        places = torch.arange(x.shape[1], device=x.device)
        return x[torch.arange(len(x)), (places * mask).argmax(1)]
    if layout.readout == "first+mean":
        others = pooled(replace(layout, readout="mean"), x[:, 1:], mask[:, 1:])
        return torch.cat([x[:, 0], others], dim=1)
    x, share = x[:, layout.prefix :], mask[:, layout.prefix :].to(x.dtype)
    mean: Tensor = (share[:, :, None] * x).sum(1) / share.sum(1, keepdim=True)
    return mean


def read_out(
    model: nn.Module, layout: Layout, stream: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return what the head reads (n, …): `pooled` rows behind final norm, pooler or transform."""
    if layout.transform is not None:
        dense = apply(model, layout.transform.dense, pooled(layout, stream, mask))
        return apply(model, layout.transform.norm, layout.transform.activation(dense))
    if layout.pooler is not None:
        dense = apply(model, layout.pooler.dense, pooled(layout, stream, mask))
        return layout.pooler.activation(dense)
    if layout.pool_first:
        return apply(model, layout.final_norm, pooled(layout, stream, mask))
    return pooled(layout, last_normed(model, layout, stream), mask)


def last_normed(model: nn.Module, layout: Layout, stream: Tensor) -> Tensor:
    """Return the last stream behind the final norm, where there is one: the last hidden state."""
    return apply(model, layout.final_norm, stream) if layout.final_norm else stream


def streams(model: nn.Module, layout: Layout, inputs: Inputs) -> Iterator[Tensor]:
    """Yield the stream at every depth: after embedding, each attention and each MLP."""
    yield from streams_from(model, layout, start(model, layout, inputs))


def streams_from(model: nn.Module, layout: Layout, begun: Start) -> Iterator[Tensor]:
    """Yield the stream at every depth of a batch that was started."""
    x = begun.stream
    yield x
    for block, told in zip(layout.blocks, begun.calls, strict=True):
        heads = attend(model, block, x, told)
        x = landed(model, block, block.attention_norm, x + written(model, block, "o", heads))
        yield x
        x = landed(model, block, block.mlp_norm, x + mlp(model, block, x)[1])
        yield x


def written(model: nn.Module, block: Block, part: str, units: Tensor) -> Tensor:
    """Return what a part (o or down) makes of its units, behind the branch's own norm, if any."""
    out, norm = apply(model, getattr(block, part), units), block.post(part)
    return apply(model, norm, out) if norm else out


def mlp(model: nn.Module, block: Block, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden units' activations and the branch's output for a stream."""
    seen = reading(model, block, block.mlp_norm, stream)
    if not block.down.startswith(f"{block.mlp}."):
        units = apply(model, block.mlp, seen)
        return units, written(model, block, "down", units)
    with watch(model, units=block.down) as caught:
        out = apply(model, block.mlp, seen)
    return caught["units"], apply(model, block.mlp_post, out) if block.mlp_post else out


def flat(x: Tensor, places: Tensor | None = None) -> Tensor:
    """Return tokens (batch, tokens, d) as rows (batch·tokens, d), or those at `places`."""
    whole = x.reshape(-1, x.shape[-1])
    return whole if places is None or len(places) == len(whole) else whole[places]


def rows(x: Tensor, places: Tensor | None = None) -> Tensor:
    """Return float64 rows, see `flat`."""
    return flat(x, places).double()
