"""Run a transformer block by block, keeping only its residual streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from slimfuse.families import Block, Layout


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


def embed(model: nn.Module, layout: Layout, inputs: Tensor) -> Tensor:
    """Return the first stream (batch, tokens, d) of inputs (batch, …)."""
    stream: Tensor = model.get_submodule(layout.embed)(inputs)
    return stream


def embed_sum(model: nn.Module, layout: Layout, inputs: Tensor) -> Tensor:
    """Return what a post-norm model's first norm sees: the sum of the embeddings."""
    with watch(model, total=layout.embed_norm) as seen:
        embed(model, layout, inputs)
    return seen["total"]


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


def attend(model: nn.Module, block: Block, seen: Tensor) -> Tensor:
    """Return the heads' outputs (batch, tokens, heads·units), before the output projection.

    seen: what the branch reads, see `reading`.
    """
    with watch(model, context=block.o) as caught:
        model.get_submodule(block.attention)(seen)
    return caught["context"]


def apply(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """Return what the module at `path` makes of x."""
    out: Tensor = model.get_submodule(path)(x)
    return out


def read_out(model: nn.Module, layout: Layout, stream: Tensor) -> Tensor:
    """Return what the head reads (batch, …): the readout token behind final norm or pooler."""
    if layout.pooler is not None:
        dense = apply(model, layout.pooler.dense, stream[:, layout.readout])
        return layout.pooler.activation(dense)
    normed = apply(model, layout.final_norm, stream) if layout.final_norm else stream
    return normed[:, layout.readout]


def streams(model: nn.Module, layout: Layout, inputs: Tensor) -> Iterator[Tensor]:
    """Yield the stream at every depth: after embedding, each attention and each MLP."""
    x = embed(model, layout, inputs)
    yield x
    for block in layout.blocks:
        heads = attend(model, block, reading(model, block, block.attention_norm, x))
        x = landed(model, block, block.attention_norm, x + apply(model, block.o, heads))
        yield x
        x = landed(model, block, block.mlp_norm, x + mlp(model, block, x)[1])
        yield x


def mlp(model: nn.Module, block: Block, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden units' activations and the branch's output for a stream."""
    seen = reading(model, block, block.mlp_norm, stream)
    if not block.down.startswith(f"{block.mlp}."):
        units = apply(model, block.mlp, seen)
        return units, apply(model, block.down, units)
    with watch(model, units=block.down) as caught:
        out = apply(model, block.mlp, seen)
    return caught["units"], out


def flat(x: Tensor, places: Tensor | None = None) -> Tensor:
    """Return tokens (batch, tokens, d) as rows (batch·tokens, d), or those at `places`."""
    whole = x.reshape(-1, x.shape[-1])
    return whole if places is None or len(places) == len(whole) else whole[places]


def rows(x: Tensor, places: Tensor | None = None) -> Tensor:
    """Return float64 rows, see `flat`."""
    return flat(x, places).double()
