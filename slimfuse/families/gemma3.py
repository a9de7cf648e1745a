"""Hugging Face Gemma 3, text only (Gemma Team 2025, arXiv 2503.19786).

Llama's kind with norms before and behind every branch, norms of queries and keys, a gated GELU,
embeddings scaled by √hidden_size, and attention that is local in most blocks. The class' norms
multiply by 1 + w. Models here are working forms whose norms multiply by γ = 1 + w; `save` writes
the stock form.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimfuse.errors import ParentError
from slimfuse.families.base import Layout, Shape
from slimfuse.families.decoder import Decoder, shared_copy

GAIN = "RMSNorm"  # what the names of the class' norms end with


class GainNorm(nn.Module):
    """RMSNorm, γ x / √(mean square of x + ε), in float32 at least."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed channels of x (…, d)."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).type_as(x)


class Gemma3(Decoder):
    """`Gemma3ForCausalLM` with any width, depth, key heads and MLP width, tied or untied.

    A target with fewer blocks has full attention in those whose even share of the parent's blocks
    has one with it, and a window in the others.
    """

    name = "gemma3"
    stock = "Gemma3ForCausalLM"
    alike = (
        "vocab_size", "hidden_activation", "rms_norm_eps", "rope_parameters",
        "query_pre_attn_scalar", "sliding_window",
    )  # fmt: skip
    qk_norm = True
    norms: ClassVar = {
        "attention_norm": "input_layernorm",
        "attention_post": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post": "post_feedforward_layernorm",
    }

    @property
    def model_type(self) -> str:
        """Transformers' name of the architecture."""
        return "gemma3_text"

    def new_config(self, shape: Shape, **inputs: Any) -> Any:
        """Return a config for training from scratch, see `Decoder.new_config`.

        Scores are divided by √head_dim unless `query_pre_attn_scalar` says otherwise.
        """
        size = inputs.get("head_dim") or shape.hidden_size // shape.num_attention_heads
        return super().new_config(shape, **{"query_pre_attn_scalar": size, **inputs})

    def layout(self, config: Any) -> Layout:
        """Return where the parts are."""
        scale = float(torch.tensor(config.hidden_size**0.5))  # the class keeps it in float32
        return replace(super().layout(config), embed_scale=scale)

    def check(self, config: Any, where: str) -> None:
        """Raise ParentError for what real checkpoints don't have."""
        keys = ("attention_bias", "use_bidirectional_attention", "final_logit_softcapping")
        found = [key for key in keys if getattr(config, key, None)]
        if found:
            raise ParentError(
                "a config of this kind isn't known",
                where=where,
                got=", ".join(f"{key} {getattr(config, key)}" for key in found),
                allowed="none of them",
            )

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model in its working form, in evaluation mode."""
        return _working(super().build(config, attention=attention))

    def load(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model in its working form, strictly; raises ParentError."""
        return _working(super().load(folder, attention=attention, revision=revision))

    def stock_form(self, model: nn.Module) -> nn.Module:
        """Return the stock model with the weights of a working form."""
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

        stock = shared_copy(model)
        for path, norm in list(stock.named_modules()):
            if isinstance(norm, GainNorm):
                with torch.device("meta"):
                    own = Gemma3RMSNorm(len(norm.weight), eps=norm.eps)
                own.weight = nn.Parameter(norm.weight.detach() - 1)
                stock.set_submodule(path, own)
        return stock

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the stock form: config.json and model.safetensors."""
        super().save(self.stock_form(model), folder)


def _working(model: nn.Module) -> nn.Module:
    """Put norms that multiply by γ in the place of the class' own, in the model itself."""
    for path, norm in list(model.named_modules()):
        if type(norm).__name__.endswith(GAIN):
            own = GainNorm(norm.weight.detach() + 1, norm.eps)
            model.set_submodule(path, own)
    return model
