"""Hugging Face BERT (Devlin et al. 2019, arXiv 1810.04805): post-norm."""

from __future__ import annotations

from typing import ClassVar

import torch

from slimfuse.families.base import Pooler
from slimfuse.families.encoder import TextEncoder
from slimfuse.families.endings import WordHead, text_endings


class Bert(TextEncoder):
    """BERT with any width, depth, heads and MLP width."""

    name = "bert"
    endings: ClassVar = text_endings(
        "Bert",
        "bert",
        ("classifier", Pooler("bert.pooler.dense", "pool", torch.tanh)),
        WordHead(
            "BertForMaskedLM",
            "bert",
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            head="cls.predictions.decoder",
            bias="cls.predictions.bias",
            act="hidden_act",
        ),
    )
