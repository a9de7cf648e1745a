"""Hugging Face Qwen3 (Yang et al. 2025, arXiv 2505.09388): Llama's kind, QK-norm."""

from __future__ import annotations

from slimfuse.families.decoder import Decoder


class Qwen3(Decoder):
    """`Qwen3ForCausalLM` with any width, depth, key heads and MLP width, tied or untied."""

    name = "qwen3"
    stock = "Qwen3ForCausalLM"
    alike = (
        "vocab_size",
        "hidden_act",
        "rms_norm_eps",
        "rope_parameters",
        "sliding_window",
        "attention_bias",
    )
    qk_norm = True
