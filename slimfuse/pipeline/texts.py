"""A recipe's texts, and the tokenizer that its parents share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slimfuse.batch import Batch
from slimfuse.data import TextData, load_texts, load_wordnet
from slimfuse.errors import ParentError
from slimfuse.families import Family, TextFamily
from slimfuse.pipeline.labelling import limited
from slimfuse.recipe import Data, TrainConfig
from slimfuse.tasks.text_classification import TextClassification, backend

TASK = TextClassification()
SEEN = 512  # texts that say how long a usual one is
USUAL = 0.9  # of all texts are no longer than a usual one
LISTED = 5  # tokens in an error


@dataclass(frozen=True)
class Texts:
    """What a recipe's texts are to its models."""

    data: TextData
    preprocessor: Any

    def new_config(
        self, family: Family, spec: TrainConfig, labels: Sequence[str], where: str
    ) -> Any:
        """Refuse: a text model needs a tokenizer, which only a saved one brings."""
        raise ParentError(
            "models of texts can't be trained from scratch",
            where=f"{where}.config",
            hint="name a pretrained model under train.start",
        )

    @cached_property
    def usual(self) -> Batch:
        """Two texts, padded to a length that nine of ten don't pass."""
        texts = TASK.samples(self.data.test.sample(SEEN, 0), self.preprocessor)
        size = int(texts.lengths.double().quantile(USUAL, interpolation="higher"))
        fitting = (texts.lengths <= size).nonzero()[:, 0]
        longest = fitting[texts.lengths[fitting].argsort(descending=True)]
        texts.length = size
        return texts[longest[:2].repeat(2)[:2]]

    def tokens(self, config: Any) -> int:
        """Return the length of a usual text."""
        return int(self.usual.arguments["input_ids"].shape[1])

    def flops(self, family: Family, config: Any) -> int:
        """Return the floating-point operations of a usual text."""
        return family.flops(config, self.tokens(config))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the tokens that are kept in memory: Python's lists of whole numbers."""
        tokens = self.tokens(None) * (len(self.data.train) + len(self.data.test))
        return 3 * 8 * tokens

    @property
    def example(self) -> Batch:
        """Two usual texts."""
        return self.usual


def open_texts(
    spec: Data,
    family: TextFamily,
    folders: Mapping[str, Path],
    configs: Mapping[str, Any],
    beside: Path,
) -> Texts:
    """Return a recipe's texts and the tokenizer of the models in `folders`.

    configs: of all of them. Raises ParentError or DataError.
    """
    data = load(spec, beside)
    longest = [c.max_position_embeddings - family.first_position(c) for c in configs.values()]
    tokenizer = common_tokenizer(folders)
    wanted = [spec.max_length] if spec.max_length is not None else [tokenizer.model_max_length]
    tokenizer.model_max_length = int(min(*wanted, *longest))
    if spec.max_length is not None and spec.max_length > min(longest):
        raise ParentError(
            "texts can't be longer than the parents take",
            where="data.max_length",
            got=spec.max_length,
            allowed=f"1 … {min(longest)} tokens",
        )
    return Texts(data, tokenizer)


def load(spec: Data, beside: Path) -> TextData:
    """Return the texts of a recipe, cut to its limits."""
    path = spec.path
    if path is not None and (beside / path).exists():
        path = str(beside / path)
    if spec.source == "wordnet":
        data = load_wordnet(path)
    else:
        assert path is not None
        data = load_texts(
            path,
            config=spec.config,
            folder=spec.source == "textfolder",
            train_split=spec.train_split,
            test_split=spec.test_split,
            text_column=spec.text_column,
            label_column=spec.label_column,
        )
    return limited(data, spec)


def common_tokenizer(folders: Mapping[str, Path]) -> Any:
    """Return the tokenizer that all models share; raises ParentError where they differ."""
    found = {name: TASK.load(folder) for name, folder in folders.items()}
    (first, base), *others = found.items()
    for name, tokenizer in others:
        differing = _differences(first, base, name, tokenizer)
        if differing:
            raise ParentError(
                "the parents cut texts into other tokens",
                where="tokenizer.json",
                got="; ".join(differing),
                hint="fuse models with one tokenizer",
            )
    base.model_max_length = min(t.model_max_length for t in found.values())
    return base


def _differences(first: str, base: Any, name: str, other: Any) -> list[str]:
    """Return what keeps two tokenizers apart, one line each."""
    one, two = base.get_vocab(), other.get_vocab()
    if one != two:
        odd = sorted(t for t in one.keys() | two.keys() if one.get(t) != two.get(t))
        shown = ", ".join(repr(t) for t in odd[:LISTED])
        return [
            f"vocabulary: {first} has {len(one)} tokens, {name} {len(two)}, {len(odd)} differ, "
            f"such as {shown}"
        ]
    left, right = json.loads(backend(base)), json.loads(backend(other))
    keys = [k for k in left.keys() | right.keys() if left.get(k) != right.get(k)]
    return [f"{key} of {first} and {name}" for key in sorted(keys)]
