"""Tiny decoders of Llama's kind, whose norms compute in float64, and helpers about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs, call
from slimfuse.families import Shape
from slimfuse.families.decoder import EMBEDDING, Decoder
from slimfuse.families.gemma3 import Gemma3
from slimfuse.families.llama import Llama
from slimfuse.families.qwen2 import Qwen2
from slimfuse.families.qwen3 import Qwen3
from slimfuse.spaces import AxisMap, transform
from slimfuse.transport import TransportMap

DECODERS: dict[str, Decoder] = {
    "llama": Llama(),
    "qwen2": Qwen2(),
    "qwen3": Qwen3(),
    "gemma3": Gemma3(),
}
WIDE = Shape(36, 6, 17, 2)
NARROW = Shape(20, 4, 11, 2)
KEY_HEADS, HEAD_DIM, VOCABULARY, TOKENS = 3, 4, 53, 7
WINDOWS: dict[str, Any] = {
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
}
EVERY = ("resid", "head", "group", "vo", "mlp")
# function-preserving: what the config says when a space doubles
WIDER: dict[str, dict[str, int]] = {
    "resid": {"hidden_size": 72},
    "head": {"num_attention_heads": 12, "num_key_value_heads": 6},
    "group": {"num_attention_heads": 12},
    "mlp": {"intermediate_size": 34},
}


def config_of(family: Decoder, shape: Shape = WIDE, **keys: Any) -> Any:
    """Return a tiny config with distinct sizes and no special tokens."""
    given = {
        "vocab_size": VOCABULARY, "positions": TOKENS, "key_heads": KEY_HEADS,
        "head_dim": HEAD_DIM, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        **(WINDOWS if family.name == "gemma3" else {}), **keys,
    }  # fmt: skip
    if len(given.get("layer_types", WINDOWS["layer_types"])) != shape.num_hidden_layers:
        given.pop("layer_types", None)
    return family.new_config(shape, **given)


def exact(model: nn.Module) -> nn.Module:
    """Let the norms compute in the model's own precision: the classes go through float32."""

    def in_double(norm: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
            out: Tensor = norm.weight * (x * scale)
            return out

        return forward

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = in_double(module)  # type: ignore[method-assign]
    return model


def build(family: Decoder, config: Any) -> Any:
    """Return a float64 model with exact norms."""
    return exact(family.build(config).double())


def decoder(family: Decoder, seed: int = 0, spread: float = 0.2, **keys: Any) -> Any:
    """Return a random float64 decoder; spread: of its norms' gains about 1."""
    model = build(family, config_of(family, **keys))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            fan = 1 if "embed" in name else p.shape[-1] if p.ndim > 1 else 4
            fan *= family.layout(model.config).embed_scale ** 2 if "embed" in name else 1
            p.copy_(1 + spread * noise if "norm" in name else noise / fan**0.5)
    return model


def ids(n: int, seed: int = 1, tokens: int = TOKENS) -> Tensor:
    """Return token ids (n, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (n, tokens), generator=generator)


def logits(model: nn.Module, x: Inputs | None = None) -> Tensor:
    """Return the logits (n, tokens, vocabulary)."""
    with torch.no_grad():
        out: Tensor = call(model, ids(9) if x is None else x).logits
    return out


def gap(a: nn.Module, b: nn.Module) -> float:
    """Return the largest difference of two models' logits, in units of the second's largest."""
    found, wanted = logits(a), logits(b)
    return float((found - wanted).abs().max() / wanted.abs().max())


def moved(
    family: Decoder,
    model: Any,
    spaces: tuple[str, ...],
    make: Callable[[int, int], TransportMap],
    **sizes: int,
) -> Any:
    """Return the model with a map in every space whose name starts with one of `spaces`.

    sizes: what of the config changes. Of a tied model that is widened the final norm takes over
    the factor of the table, which writes the stream and reads it; so it does with the factor that
    balances a class' own one of embeddings.
    """
    config = type(model.config)(**{**model.config.to_diff_dict(), **sizes})
    atlas = family.atlas(model.config)
    chosen = [name for name in atlas.free if name.split(".")[0] in spaces]
    maps: dict[str, AxisMap] = {
        name: make(atlas.spaces[name].size, seed) for seed, name in enumerate(chosen)
    }
    out = build(family, config)
    state = transform({k: p.detach() for k, p in model.named_parameters()}, atlas, maps)
    factor = family.layout(model.config).embed_scale / family.layout(config).embed_scale
    state[EMBEDDING] *= factor
    if config.tie_word_embeddings:
        state["model.norm.weight"] *= model.config.hidden_size / config.hidden_size / factor
    for name, value in out.named_parameters():
        value.data.copy_(state[name])
    return out
