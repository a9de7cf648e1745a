"""Texts that go on, token by token.

The graph has no cache of keys and values, so every token costs a pass over the whole text: the
time grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse_export.deployed.answers import Answer, softmax
from slimfuse_export.deployed.options import Options
from slimfuse_export.deployed.texts import TextPreparation, Tokens

Run = Callable[[Sequence[Tokens]], NDArray[Any]]
"""From texts to the logits (rows, vocabulary) behind the last token of each."""


@dataclass
class _Going:
    """A text on its way."""

    ids: list[int]
    options: Options
    rng: np.random.Generator
    new: list[int] = field(default_factory=list)
    finish: str = ""


def generate(
    prompts: Sequence[Tokens],
    options: Sequence[Options],
    preparation: TextPreparation,
    ends: frozenset[int],
    run: Run,
) -> list[Answer]:
    """Return, for each prompt, the text behind it, its tokens' number and why it ended.

    Every text has its own options and random numbers, so what comes out does not depend on what
    shares a batch with it. ends: ids that end a text. finish is `end` for one of them, `length`
    for max_new_tokens, `limit` where the model has no places left.
    """
    every = [
        _Going(list(row.ids), wanted, np.random.default_rng(wanted.seed))
        for row, wanted in zip(prompts, options, strict=True)
    ]
    while going := [text for text in every if not text.finish]:
        rows = [Tokens(tuple(text.ids), (0,) * len(text.ids)) for text in going]
        for text, logits in zip(going, run(rows), strict=True):
            token = choose(logits, text.options.temperature, text.rng)
            if token in ends:
                text.finish = "end"
                continue
            text.new.append(token)
            text.ids.append(token)
            if len(text.new) >= text.options.max_new_tokens:
                text.finish = "length"
            elif preparation.limit is not None and len(text.ids) >= preparation.limit:
                text.finish = "limit"
    return [
        {"text": preparation.decode(t.new), "tokens": len(t.new), "finish": t.finish} for t in every
    ]


def choose(logits: NDArray[Any], temperature: float, rng: np.random.Generator) -> int:
    """Return the next token's id: the likeliest at temperature 0, else drawn from logits / it."""
    if temperature == 0:
        return int(logits.argmax())
    shifted = logits.astype(np.float64)
    shares = softmax((shifted - shifted.max()) / temperature)
    return int(
        np.searchsorted(shares.cumsum(), rng.random(), side="right").clip(0, len(shares) - 1)
    )
