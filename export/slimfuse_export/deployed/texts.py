"""Texts as tokens, by the saved tokenizer and without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from slimfuse_export.deployed.description import Description, read_json
from slimfuse_export.errors import ExportError
from slimfuse_export.sessions import first_line

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
_UNLIMITED = 10**9  # tokenizers without a limit are saved with 1e30 or so


@dataclass(frozen=True)
class Tokens:
    """One text's token ids, the sequence each is of, and whether the text was cut."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TextPreparation:
    """The saved tokenizer and what it is told.

    limit: most tokens of a text, those that the tokenizer adds included; None for no limit. pad:
    id that fills texts of a batch up on the right. mask, start: ids of the mask and of a text's
    beginning, where there are such. inputs: of the graph.
    """

    tokenizer: Tokenizer
    limit: int | None
    pad: int
    mask: int | None
    start: int | None
    lowercase: bool
    inputs: tuple[str, ...]

    def __call__(self, text: str, *, truncate: bool = True) -> Tokens:
        """Return a text's tokens, cut to the limit as in training.

        Raises: ExportError for a text that is no Unicode or, unless `truncate`, too long.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ExportError(
                "the text is no valid Unicode", got=f"{error.object[error.start]!a}"
            ) from error
        found = self.tokenizer.encode(text.lower() if self.lowercase else text)
        truncated = bool(found.overflowing)
        if truncated and not truncate:
            raise ExportError(
                "the text is too long", allowed=f"{self.limit} tokens", hint="shorten it"
            )
        return Tokens(tuple(found.ids), tuple(found.type_ids), truncated)

    @property
    def batches_lengths(self) -> bool:
        """Whether texts of different lengths may share a batch."""
        return MASK in self.inputs

    def collate(self, rows: Sequence[Tokens]) -> dict[str, NDArray[np.int64]]:
        """Return the graph's inputs (rows, longest), filled up on the right and masked."""
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self.pad, np.int64)
        types, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
        for i, row in enumerate(rows):
            ids[i, : len(row)], types[i, : len(row)], mask[i, : len(row)] = row.ids, row.types, 1
        every = {IDS: ids, TYPES: types, MASK: mask}
        return {name: every[name] for name in self.inputs}

    def token(self, number: int | None) -> str:
        """Return what the vocabulary calls a token."""
        return "" if number is None else str(self.tokenizer.id_to_token(number))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def read_tokenizer(description: Description, inputs: Sequence[str]) -> TextPreparation:
    """Return how a folder's texts are prepared; inputs: of the graph.

    The limit is the tokenizer's own, the model's places or, of a sentence encoder, what
    sentence-transformers gives it, whichever is least.
    Raises: ExportError for a missing or unreadable tokenizer and inputs it doesn't make.
    """
    odd = sorted(set(inputs) - {IDS, MASK, TYPES})
    if odd:
        raise ExportError(
            "the model wants inputs that no tokenizer makes",
            got=", ".join(odd),
            allowed=f"{IDS}, {MASK}, {TYPES}",
        )
    where = description.folder / TOKENIZER
    try:
        tokenizer = Tokenizer.from_str(where.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise ExportError(
            "the tokenizer can't be opened",
            where=where,
            got=first_line(error),
            hint="save it beside the model with save_pretrained of a fast tokenizer",
        ) from error
    path = description.folder / SETTINGS
    settings = read_json(path) if path.is_file() else {}
    said = settings.get("model_max_length")
    own = int(said) if isinstance(said, int | float) and 0 < said < _UNLIMITED else None
    limits = [n for n in (own, description.positions, description.longest) if n]
    limit = min(limits, default=None)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if limit is not None:
        side = str(settings.get("truncation_side", "right"))
        tokenizer.enable_truncation(limit, direction=side)
    ids = {use: _special(tokenizer, settings, use) for use in ("pad", "mask", "bos", "eos")}
    pad = next((n for n in (ids["pad"], ids["eos"]) if n is not None), 0)
    return TextPreparation(
        tokenizer, limit, pad, ids["mask"], ids["bos"], description.lowercase, tuple(inputs)
    )


def _special(tokenizer: Tokenizer, settings: dict[str, Any], use: str) -> int | None:
    """Return the id of the token for a use (pad, mask, …), None where there is none."""
    token = settings.get(f"{use}_token")
    content = token.get("content") if isinstance(token, dict) else token
    found: int | None = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return found
