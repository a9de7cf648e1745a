"""Hugging Face DistilBERT (Sanh et al. 2019, arXiv 1910.01108): BERT without segments."""

from __future__ import annotations

from typing import ClassVar

import torch

from slimfuse.families.base import Pooler
from slimfuse.families.encoder import TextEncoder
from slimfuse.families.endings import WordHead, text_endings


class DistilBert(TextEncoder):
    """DistilBERT; norms are as in BERT, with ε = 1e-12 for all."""

    name = "distilbert"
    endings: ClassVar = text_endings(
        "DistilBert",
        "distilbert",
        ("classifier", Pooler("pre_classifier", "pool", torch.relu)),
        WordHead(
            "DistilBertForMaskedLM",
            "distilbert",
            dense="vocab_transform",
            norm="vocab_layer_norm",
            head="vocab_projector",
            bias="vocab_projector.bias",
            act="activation",
        ),
        pooler=False,
    )
    stem = "transformer.layer.{i}"
    parts: ClassVar = {
        "attention": "attention",
        "attention_norm": "sa_layer_norm",
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "mlp": "ffn",
        "mlp_norm": "output_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    }
    types = False
    heads = (*TextEncoder.heads, "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")
    mlp_key = "hidden_dim"
    alike = ("vocab_size", "max_position_embeddings", "activation")
