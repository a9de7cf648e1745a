"""Texts joined and cut into blocks of one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimfuse.batch import MASK, Batch
from slimfuse.data import Split
from slimfuse.errors import DataError
from slimfuse.progress import track

CHUNK = 2048  # texts that are cut into tokens at a time


class Blocks:
    """A split's texts, one after the other, cut into blocks of `length` tokens; the rest is left.

    Around every text stands what the tokenizer itself puts there (BERT's [CLS] and [SEP], Llama's
    beginning); where that is nothing, a line break stands behind it. Raises DataError where all
    texts together are shorter than one block.
    """

    def __init__(self, split: Split, tokenizer: Any, length: int) -> None:
        self.tokenizer = tokenizer
        self.length: int | None = length
        ids = _joined(split, tokenizer)
        count = len(ids) // length
        if len(split) and not count:
            raise DataError(
                "the texts are too short to be cut into blocks",
                where="data.max_length",
                got=f"{len(ids)} tokens in {len(split)} texts, blocks of {length}",
                hint="set data.max_length to fewer tokens, or data.packing to false",
            )
        self._ids = ids[: count * length].view(count, length)
        self.labels = torch.zeros(count, dtype=torch.long)
        self.lengths = torch.full((count,), length)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, indices: Tensor) -> Batch:
        """Return token ids and a mask of ones, each (batch, length)."""
        ids = self._ids[indices].long()
        return Batch({"input_ids": ids, MASK: torch.ones_like(ids)})

    @property
    def order(self) -> Tensor:
        """Every block once, as they stand."""
        return torch.arange(len(self))


def _joined(split: Split, tokenizer: Any) -> Tensor:
    """Return the tokens (n,) of all texts, int32."""
    end = "" if tokenizer.num_special_tokens_to_add() else "\n"
    parts = [torch.zeros(0, dtype=torch.int32)]
    with track("cutting texts into tokens", len(split)) as tell:
        for start in range(0, len(split), CHUNK):
            stop = min(start + CHUNK, len(split))
            texts = [f"{split.items[i]}{end}" for i in range(start, stop)]
            # verbose would warn of texts longer than the model takes: they are cut below
            found = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
            parts.append(torch.tensor([i for ids in found for i in ids], dtype=torch.int32))
            tell(stop)
    return torch.cat(parts)
