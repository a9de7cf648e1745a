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


def embed(model: nn.Module, layout: Layout, pixels: Tensor) -> Tensor:
    """Return the first stream (batch, tokens, d)."""
    stream: Tensor = model.get_submodule(layout.embed)(pixels)
    return stream


def attend(model: nn.Module, block: Block, normed: Tensor) -> Tensor:
    """Return the heads' outputs (batch, tokens, heads·units), before the output projection."""
    with watch(model, context=block.o) as seen:
        model.get_submodule(block.attention)(normed)
    return seen["context"]


def apply(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """Return what the module at `path` makes of x."""
    out: Tensor = model.get_submodule(path)(x)
    return out


def read_out(model: nn.Module, layout: Layout, stream: Tensor) -> Tensor:
    """Return the normed readout token (batch, d) that the head sees."""
    return apply(model, layout.final_norm, stream)[:, layout.readout]


def streams(model: nn.Module, layout: Layout, pixels: Tensor) -> Iterator[Tensor]:
    """Yield the stream at every depth: after embedding, each attention and each MLP."""
    x = embed(model, layout, pixels)
    yield x
    for block in layout.blocks:
        x = x + apply(model, block.o, attend(model, block, apply(model, block.attention_norm, x)))
        yield x
        x = x + mlp(model, block, x)[1]
        yield x


def mlp(model: nn.Module, block: Block, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden units' activations and the branch's output for a stream."""
    with watch(model, units=block.down) as seen:
        out = apply(model, block.mlp, apply(model, block.mlp_norm, stream))
    return seen["units"], out


def rows(x: Tensor) -> Tensor:
    """Return tokens (batch, tokens, d) as float64 rows (batch·tokens, d)."""
    return x.reshape(-1, x.shape[-1]).double()
