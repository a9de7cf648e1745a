"""What tasks of texts share: tokens, padded batches, the saved tokenizer."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from slimfuse.batch import MASK, Batch
from slimfuse.data import Split
from slimfuse.errors import ParentError, first_line
from slimfuse.tasks.base import Samples, Task

IDS = "input_ids"
SIDES = ("truncation_side", "padding_side")
CALLED = ("max_length", "stride", "truncation_strategy")
"""What stays in a tokenizer's settings of its last call before it was saved."""
PLAIN = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""The class of a tokenizer of no model, as transformers 5 call it and as all releases know it."""


class TextSamples(Samples, Protocol):
    """Texts as tokens. lengths: of each text (n,); length: what batches are padded to, if given."""

    lengths: Tensor
    length: int | None
    tokenizer: Any


class Tokens:
    """A split seen through a tokenizer: encoded once, padded on the right when asked for.

    length: what every batch is padded to, None for the longest of each batch; most: tokens of a
    text, None for as many as the tokenizer says.
    """

    def __init__(
        self,
        split: Split,
        tokenizer: Any,
        length: int | None = None,
        *,
        most: int | None = None,
    ) -> None:
        self.labels = torch.from_numpy(np.ascontiguousarray(split.labels))
        self.tokenizer = tokenizer
        encoded = {}
        if len(split):
            encoded = tokenizer(list(split.items), truncation=True, max_length=most)
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


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Return the tokens that a tokenizer has a use for (pad, cls, mask, bos, …), by the use."""
    return {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if name.endswith("_token") and token is not None
    }


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
    """A task whose samples are texts, cut into tokens by the saved tokenizer.

    length: the most tokens of a sample, None for as many as the tokenizer says. It is the run's
    alone: the tokenizer that is saved keeps its own limit.
    """

    sample = "text"
    length: int | None = None
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

    def truncating(self, length: int) -> Self:
        """Return the task with samples of so many tokens at most."""
        found = copy.copy(self)
        found.length = length
        return found

    def save(self, preprocessor: Any, folder: Path) -> None:
        """Write the tokenizer as it is told to be, not as it was last called."""
        for side in SIDES:  # kept with what the class was made with, or not at all
            preprocessor.init_kwargs[side] = getattr(preprocessor, side)
        for key in CALLED:
            preprocessor.init_kwargs.pop(key, None)
        preprocessor.backend_tokenizer.no_truncation()
        preprocessor.backend_tokenizer.no_padding()
        super().save(preprocessor, folder)
        _name_known(folder / "tokenizer_config.json")

    def identity(self, preprocessor: Any) -> dict[str, Any]:
        """Return a digest of the tokenizer's rules, its tokens and sides, how long texts may be."""
        named = special_tokens(preprocessor)
        return {
            "tokenizer": hashlib.sha256(backend(preprocessor).encode()).hexdigest(),
            "length": self.length or preprocessor.model_max_length,
            "limit": preprocessor.model_max_length,
            "inputs": list(preprocessor.model_input_names),
            "special": {k: [t, preprocessor.convert_tokens_to_ids(t)] for k, t in named.items()},
            "all special": sorted(preprocessor.all_special_ids),
            "sides": {side: getattr(preprocessor, side) for side in SIDES},
        }

    def samples(self, split: Split, preprocessor: Any, *, uniform: bool = False) -> TextSamples:
        """Return a split's tokens; uniform: padded to the longest of all."""
        found = Tokens(split, preprocessor, most=self.length)
        if uniform and len(found):
            found.length = int(found.lengths.max())
        return found


def _name_known(file: Path) -> None:
    """Give the saved tokenizer's class a name that transformers 4 and optimum know, too."""
    told = json.loads(file.read_text(encoding="utf-8"))
    name = told.get("tokenizer_class")
    if name in PLAIN:
        told["tokenizer_class"] = PLAIN[name]
        text = json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")
