"""Hugging Face RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT, its pooler in the head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from slimfuse.families.base import Pooler
from slimfuse.families.encoder import TextEncoder
from slimfuse.families.endings import WordHead, text_endings


class Roberta(TextEncoder):
    """RoBERTa; the first position is the one behind the pad token's."""

    name = "roberta"
    endings: ClassVar = text_endings(
        "Roberta",
        "roberta",
        ("classifier.out_proj", Pooler("classifier.dense", "pool", torch.tanh)),
        WordHead(
            "RobertaForMaskedLM",
            "roberta",
            dense="lm_head.dense",
            norm="lm_head.layer_norm",
            head="lm_head.decoder",
            bias="lm_head.bias",
        ),
    )
    alike = (*TextEncoder.alike, "pad_token_id")

    def first_position(self, config: Any) -> int:
        """Return pad_token_id + 1: pads stay at the place of their own number."""
        return int(config.pad_token_id) + 1
