"""Hugging Face MPNet (Song et al. 2020, arXiv 2004.09297): post-norm, relative positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from slimfuse.errors import ShapeError
from slimfuse.families.base import Layout, Pooler, Shape
from slimfuse.families.encoder import TextEncoder
from slimfuse.families.endings import WordHead, text_endings
from slimfuse.spaces import Space

BIASES = "encoder.relative_attention_bias.weight"
SHARED = ("num_attention_heads", "num_hidden_layers")


class MPNet(TextEncoder):
    """MPNet: one table of biases of the scores for all blocks.

    It has a column a head, so the heads of all blocks are one space: head h is the same head
    everywhere, and none can be dropped in one block alone. Heads stay as they are, each in its
    place, which holds for one parent whose blocks are all kept.
    """

    name = "mpnet"
    endings: ClassVar = text_endings(
        "MPNet",
        "mpnet",
        ("classifier.out_proj", Pooler("classifier.dense", "pool", torch.tanh)),
        WordHead(
            "MPNetForMaskedLM",
            "mpnet",
            dense="lm_head.dense",
            norm="lm_head.layer_norm",
            head="lm_head.decoder",
            bias="lm_head.bias",
        ),
    )
    parts: ClassVar = {
        **TextEncoder.parts,
        "attention_norm": "attention.LayerNorm",
        "q": "attention.attn.q",
        "k": "attention.attn.k",
        "v": "attention.attn.v",
        "o": "attention.attn.o",
    }
    head_space = "head"
    types = False
    alike = (
        "vocab_size", "max_position_embeddings", "relative_attention_num_buckets", "hidden_act",
        "layer_norm_eps",
    )  # fmt: skip

    def layout(self, config: Any) -> Layout:
        """Return where the parts are; the heads' biases stay as they are."""
        return replace(super().layout(config), kept=(self.path(BIASES),))

    def ends(self, config: Any) -> dict[str, str]:
        """Return the legs of first norm and ending, and of the biases of the scores."""
        return super().ends(config) | {self.path(BIASES): "=buckets ^head"}

    def spaces(self, config: Any) -> list[Space]:
        """Return the spaces of the tables, the stream, the ending and the biases."""
        return [
            *super().spaces(config),
            Space("buckets", config.relative_attention_num_buckets, "fixed"),
        ]

    def first_position(self, config: Any) -> int:
        """Return 2, whatever the pad token: the class' own."""
        return 2

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape`, of as many heads and blocks; else ShapeError."""
        own = self.shape(config)
        for key in SHARED:
            if getattr(shape, key) != getattr(own, key):
                raise ShapeError(
                    f"{key} of an MPNet can't change: its blocks share one table of heads",
                    where=f"target.{key}",
                    got=getattr(shape, key),
                    allowed=getattr(own, key),
                    hint="narrow hidden_size and intermediate_size instead",
                )
        return super().narrow(config, shape)

    def mismatches(self, configs: dict[str, Any]) -> list[str]:
        """Compare the configs; several parents have no heads in common."""
        several = [f"relative_attention_bias: each of {len(configs)} parents has heads of its own"]
        return super().mismatches(configs) + (several if len(configs) > 1 else [])
