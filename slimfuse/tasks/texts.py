"""What tasks of texts share: tokens, padded batches, the saved tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slimfuse.batch import MASK, Batch
from slimfuse.data import Split
from slimfuse.errors import ParentError, first_line
from slimfuse.tasks.base import Samples, Task

IDS = "input_ids"


class TextSamples(Samples, Protocol):
    """Texts as tokens. lengths: of each text (n,); length: what batches are padded to, if given."""

    lengths: Tensor
    length: int | None
    tokenizer: Any


class Tokens:
    """A split seen through a tokenizer: encoded once, padded on the right when asked for.

    length: what every batch is padded to, None for the longest of each batch.
    """

    def __init__(self, split: Split, tokenizer: Any, length: int | None = None) -> None:
        self.labels = torch.from_numpy(np.ascontiguousarray(split.labels))
        self.tokenizer = tokenizer
        encoded = tokenizer(list(split.items), truncation=True) if len(split) else {}
        self._columns: dict[str, list[list[int]]] = dict(encoded.items())
        pad = tokenizer.pad_token_id
        self._fill = {IDS: pad if pad is not None else tokenizer.eos_token_id or 0, MASK: 0}
        self.lengths = torch.tensor([len(ids) for ids in self._columns.get(IDS, [])])
        self.length = length

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Batch:
        """Return token ids, mask and what else the tokenizer makes, each (batch, tokens)."""
        size = self.length or int(self.lengths[indices].max())
        arguments = {}
        for name, column in self._columns.items():
            padded = torch.full((len(indices), size), self._fill.get(name, 0))
            for row, i in enumerate(indices.tolist()):
                padded[row, : len(column[i])] = torch.tensor(column[i])
            arguments[name] = padded
        return Batch(arguments)

    @property
    def order(self) -> Tensor:
        """Every sample once, short ones first."""
        return self.lengths.argsort(stable=True)


def backend(tokenizer: Any) -> str:
    """Return all that a tokenizer does, as JSON; how it was last called left out."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({k: v for k, v in told.items() if k not in ("truncation", "padding")})


def load_tokenizer(folder: Path) -> Any:
    """Return the saved tokenizer of a model's folder; raises ParentError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ParentError(
            "the tokenizer can't be opened",
            where=str(folder),
            got=first_line(error),
            hint="save it beside the model with tokenizer.save_pretrained",
        ) from error
    if not tokenizer.is_fast:
        raise ParentError(
            "the tokenizer can't be used",
            where=str(folder),
            got="no tokenizer.json",
            allowed="a fast tokenizer",
        )
    return tokenizer


class TextTask(Task):
    """A task whose samples are texts, cut into tokens by the saved tokenizer."""

    sample = "text"
    preprocessor = "tokenizer"
    files: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json")
    auto_preprocessor = "AutoTokenizer"

    def load(self, folder: Path) -> Any:
        """Return the saved tokenizer of a model's folder; raises ParentError."""
        tokenizer = load_tokenizer(folder)
        if tokenizer.pad_token_id is None:
            raise ParentError(
                "the tokenizer can't be used",
                where=str(folder),
                got="no padding token",
                allowed="a fast tokenizer with a padding token",
            )
        return tokenizer

    def identity(self, preprocessor: Any) -> dict[str, Any]:
        """Return a digest of the whole tokenizer, and how long texts may be."""
        return {
            "tokenizer": hashlib.sha256(backend(preprocessor).encode()).hexdigest(),
            "length": preprocessor.model_max_length,
            "inputs": list(preprocessor.model_input_names),
        }

    def samples(self, split: Split, preprocessor: Any, *, uniform: bool = False) -> TextSamples:
        """Return a split's tokens; uniform: padded to the longest of all."""
        found = Tokens(split, preprocessor)
        if uniform and len(found):
            found.length = int(found.lengths.max())
        return found
