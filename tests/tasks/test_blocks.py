"""Blocks: every token of every text once, in order, but for the rest behind the last block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_text import tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slimfuse.data import Split
from slimfuse.errors import DataError
from slimfuse.tasks import CausalLanguageModelling, blocks
from slimfuse.tasks.blocks import Blocks

TEXTS = ["the old cat", "a dog", "big oak and small elm and ivy of moss", "fern", "the saw"]


def split(texts: list[str]) -> Split:
    return Split(texts, np.zeros(len(texts), dtype=np.int64))


def characters() -> Any:
    """Return a tokenizer of characters that adds nothing and has no token to pad with."""
    known = {c: i for i, c in enumerate("\n abcdefghijklmnopqrstuvwxyz")}
    made = Tokenizer(models.BPE(known, []))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_blocks_hold_every_token_in_order_with_what_the_tokenizer_adds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "CHUNK", 2)  # texts of several chunks
    made = tokenizer()
    whole = [i for text in TEXTS for i in made(text)["input_ids"]]
    assert whole.count(made.cls_token_id) == whole.count(made.sep_token_id) == len(TEXTS)
    found = Blocks(split(TEXTS), made, 7)
    assert len(found) == len(found.labels) == len(whole) // 7 and len(whole) % 7
    batch = found[found.order]
    assert batch.arguments["input_ids"].dtype == torch.int64
    assert batch.arguments["input_ids"].flatten().tolist() == whole[: len(found) * 7]
    assert batch.arguments["attention_mask"].eq(1).all()
    assert found.lengths.tolist() == [7] * len(found)
    assert torch.equal(found[torch.tensor([2, 0])].arguments["input_ids"][1],
                       batch.arguments["input_ids"][0])  # fmt: skip


def test_a_line_break_parts_texts_where_the_tokenizer_adds_nothing() -> None:
    made = characters()
    found = Blocks(split(["ab cd", "e"]), made, 4)
    ids = found[found.order].arguments["input_ids"].flatten().tolist()
    assert "".join(made.convert_ids_to_tokens(ids)) == "ab cd\ne\n"


def test_texts_longer_than_the_model_takes_are_cut_not_truncated() -> None:
    made = tokenizer()
    made.model_max_length = 5
    text = " ".join(TEXTS)
    found = Blocks(split([text]), made, 5)
    assert len(found) == (len(text.split()) + 2) // 5


def test_the_tasks_length_cuts_texts_and_sizes_blocks_not_the_tokenizer() -> None:
    made = tokenizer()
    joined = CausalLanguageModelling().truncating(7)
    assert (
        joined.samples(split(TEXTS), made)[torch.tensor([0])].arguments["input_ids"].shape[1] == 7
    )
    alone = joined.packing(False)
    assert joined.sample == "7-token block" and alone.sample == "text"
    assert alone.samples(split(TEXTS), made).lengths.tolist() == [5, 4, 7, 3, 4]
    uniform = alone.samples(split(TEXTS), made, uniform=True)
    assert uniform[torch.tensor([1])].arguments["input_ids"].shape == (1, 7)
    whole = CausalLanguageModelling().packing(False).samples(split(TEXTS), made)
    assert whole.lengths.tolist() == [5, 4, 11, 3, 4] and made.model_max_length == 24


def test_texts_that_fill_no_block_are_refused() -> None:
    with pytest.raises(DataError, match="too short to be cut into blocks") as caught:
        Blocks(split(["the old cat"]), tokenizer(), 6)
    assert caught.value.got == "5 tokens in 1 texts, blocks of 6"
    assert len(Blocks(split([]), tokenizer(), 6)) == 0
