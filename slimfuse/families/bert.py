"""Hugging Face BERT (Devlin et al. 2019, arXiv 1810.04805): post-norm, pooled first token."""

from __future__ import annotations

import torch

from slimfuse.families.base import Pooler
from slimfuse.families.encoder import TextEncoder


class Bert(TextEncoder):
    """`BertForSequenceClassification` with any width, depth, heads and MLP width."""

    name = body = "bert"
    stock = "BertForSequenceClassification"
    pooler = Pooler("bert.pooler.dense", "pool", torch.tanh)
