"""Hugging Face Llama (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, SwiGLU, rotary positions."""

from __future__ import annotations

from slimfuse.families.decoder import Decoder


class Llama(Decoder):
    """`LlamaForCausalLM` with any width, depth, key heads and MLP width, tied or untied."""

    name = "llama"
    stock = "LlamaForCausalLM"
    alike = (
        "vocab_size", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias",
    )  # fmt: skip
