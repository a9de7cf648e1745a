"""Hugging Face Qwen2 (Yang et al. 2024, arXiv 2407.10671): Llama's kind, biases of q, k and v."""

from __future__ import annotations

from typing import Any

from slimfuse.families.decoder import Decoder


class Qwen2(Decoder):
    """`Qwen2ForCausalLM` with any width, depth, key heads and MLP width, tied or untied."""

    name = "qwen2"
    stock = "Qwen2ForCausalLM"
    alike = ("vocab_size", "hidden_act", "rms_norm_eps", "rope_parameters", "sliding_window")

    def qkv_bias(self, config: Any) -> bool:
        """Return True: the class always has them."""
        return True
