"""Hugging Face RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT, its pooler in the head."""

from __future__ import annotations

from typing import Any

import torch

from slimfuse.families.base import Pooler
from slimfuse.families.encoder import TextEncoder


class Roberta(TextEncoder):
    """`RobertaForSequenceClassification`; the first position is the one behind the pad token's."""

    name = body = "roberta"
    stock = "RobertaForSequenceClassification"
    head = "classifier.out_proj"
    pooler = Pooler("classifier.dense", "pool", torch.tanh)
    alike = (*TextEncoder.alike, "pad_token_id")

    def first_position(self, config: Any) -> int:
        """Return pad_token_id + 1: pads stay at the place of their own number."""
        return int(config.pad_token_id) + 1
