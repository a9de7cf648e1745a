"""A recipe's texts, and the tokenizer that its parents share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from slimfuse.batch import Batch
from slimfuse.data import (
    TextData,
    load_anarchism,
    load_texts,
    load_vader,
    load_wordnet,
    unlabelled,
)
from slimfuse.errors import DataError, ParentError
from slimfuse.families import Family, TextFamily
from slimfuse.pipeline.labelling import limited
from slimfuse.pipeline.lookup import TOKENIZER, find_folder
from slimfuse.pipeline.new_tokenizer import train_tokenizer
from slimfuse.pipeline.sentences import Encoder, common_encoder
from slimfuse.pipeline.shaping import shape_of
from slimfuse.pipeline.vocabularies import Order, common_tokenizer, first_position
from slimfuse.progress import working
from slimfuse.recipe import Data, TrainConfig
from slimfuse.tasks.embeddings import SentenceEmbedding
from slimfuse.tasks.text_classification import TextClassification
from slimfuse.tasks.texts import TextTask

SEEN = 512  # texts that say how long a usual one is
USUAL = 0.9  # of all texts are no longer than a usual one
BLOCK = 512  # most tokens of a block, and of a new model's texts, if the recipe doesn't say
SPECIAL = ("pad", "bos", "eos")  # tokens whose numbers a config keeps
READY = {"wordnet": load_wordnet, "vader": load_vader, "anarchism": load_anarchism}


@dataclass(frozen=True)
class Texts:
    """What a recipe's texts are to its models.

    orders: of the models with the same tokenizer, but for its tokens' numbers; each has to be
    aligned (`vocabularies.align`) before it sees these texts. rows: of a new model's vocabulary;
    positions: how long its texts may be.
    """

    data: TextData
    preprocessor: Any
    task: TextTask = field(default_factory=TextClassification)
    orders: Mapping[str, Order] = field(default_factory=dict)
    rows: int = 0
    positions: int = 0

    def new_config(
        self, family: Family, spec: TrainConfig, labels: Sequence[str], where: str
    ) -> Any:
        """Return the config of a model that the run trains, for this tokenizer."""
        special = {
            f"{kind}_token_id": getattr(self.preprocessor, f"{kind}_token_id") for kind in SPECIAL
        }
        return new_text_config(
            family, spec, labels, vocab_size=self.rows, positions=self.positions, **special
        )

    @cached_property
    def usual(self) -> Batch:
        """Two texts, padded to a length that nine of ten don't pass; or two blocks."""
        split = self.data.test if self.task.joins else self.data.test.sample(SEEN, 0)
        texts = self.task.samples(split, self.preprocessor)
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
        """Bytes of the tokens that are kept in memory: Python's lists of whole numbers.

        Of blocks 4 a token, guessed from the number of letters: few tokens are shorter than three.
        """
        splits = (self.data.train, self.data.test)
        if self.task.joins:
            return sum(4 * len(split.items[i]) // 3 for split in splits for i in range(len(split)))
        return 3 * 8 * self.tokens(None) * sum(len(split) for split in splits)

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
    task: TextTask,
) -> Texts:
    """Return a recipe's texts and the tokenizer of the models in `folders`.

    configs: of all of them. The models in `Texts.orders` are yet to be aligned. Raises ParentError
    or DataError.
    """
    told = Encoder()
    if isinstance(task, SentenceEmbedding):
        told = common_encoder(folders)
    data = load(spec, beside, labels=task.labelled)
    saved = [c.max_position_embeddings - first_position(family, c) for c in configs.values()]
    tokenizer, orders = find_tokenizer(spec, family, folders, beside, task, data)
    limit, most = limits(spec, task, saved, tokenizer.model_max_length, told.longest)
    tokenizer.model_max_length = limit
    own = task.of(data)
    assert isinstance(own, TextTask)
    own = own.truncating(most)
    if isinstance(own, SentenceEmbedding):
        own = own.pooled(told.pooling, told.longest and min(limit, max(told.longest, most)))
        if told.pooling == "cls":  # the first of all tokens, as in the run, is never padding
            tokenizer.padding_side = "right"
    # a new model is to be fused with the saved ones, so it has their sizes
    rows = max((int(c.vocab_size) for c in configs.values()), default=len(tokenizer))
    positions = min(saved, default=limit)
    return Texts(data, tokenizer, own, orders, rows, positions)


def limits(
    spec: Data, task: TextTask, saved: Sequence[int], own: int, told: int | None
) -> tuple[int, int]:
    """Return the most tokens of a text of the finished model, and of one in this run.

    The model takes what the saved tokenizers (own) and models (saved) take, though never less than
    the run gives it; told: what sentence encoders cut texts at. See `longest` for the rest.
    """
    most = longest(spec, task, saved, own if told is None else min(own, told))
    return max(most, min([own, *saved])) if saved else most, most


def longest(spec: Data, task: TextTask, saved: Sequence[int], own: int | None = None) -> int:
    """Return the most tokens of a text in a run: the recipe's, else what tokenizer and models take.

    saved: what the saved models take; own: the tokenizer, where it was opened. Raises ParentError
    where the recipe's texts are longer than the models take.
    """
    if spec.max_length is not None:
        if saved and spec.max_length > min(saved):
            raise ParentError(
                "texts can't be longer than the parents take",
                where="data.max_length",
                got=spec.max_length,
                allowed=f"1 … {min(saved)} tokens",
            )
        return spec.max_length
    every = [*saved, *([] if own is None else [own])]
    return int(min([*every, BLOCK] if task.joins or not saved else every))


def find_tokenizer(
    spec: Data,
    family: TextFamily,
    folders: Mapping[str, Path],
    beside: Path,
    task: TextTask,
    data: TextData,
) -> tuple[Any, dict[str, Order]]:
    """Return the tokenizer of all models, and the order of each one with other numbers.

    It is the recipe's own, with which that of every saved model has to agree, or the saved models'
    (in `folders`), or is trained on the training texts. Raises ParentError.
    """
    every = dict(folders)
    if spec.tokenizer is not None:
        home = find_folder(spec.tokenizer, beside, TOKENIZER, where="data.tokenizer")
        every = {"the recipe's tokenizer": home} | every
    if not every:
        assert spec.vocabulary is not None, "the recipe was checked"
        items = data.train.items
        with working("training a tokenizer"):
            length = spec.max_length or BLOCK
            tokenizer = train_tokenizer(list(items), spec.vocabulary, family.name, length)
        return tokenizer, {}
    tokenizer, orders = common_tokenizer(task, every)
    if task.name == "masked-lm" and tokenizer.mask_token_id is None:
        raise ParentError(
            "the tokenizer has no token for what is masked",
            where="data.tokenizer" if spec.tokenizer is not None else "parents",
            hint="name its mask_token in tokenizer_config.json",
        )
    return tokenizer, orders


def new_text_config(
    family: Family, spec: TrainConfig, labels: Sequence[str], **inputs: int | None
) -> Any:
    """Return the config of a new model of texts; inputs: what its tokenizer says, see families."""
    given: dict[str, Any] = dict(inputs)
    if labels:
        given["labels"] = labels
    if spec.num_key_value_heads is not None:
        given["key_heads"] = spec.num_key_value_heads
    return family.new_config(shape_of(spec), **given)


def load(spec: Data, beside: Path, *, labels: bool = True) -> TextData:
    """Return the texts of a recipe, cut to its limits; labels: whether the task needs them."""
    path = spec.path
    if path is not None and (beside / path).exists():
        path = str(beside / path)
    if spec.source in READY:
        data = READY[spec.source](path)
        data = data if labels else unlabelled(data)
    else:
        assert path is not None
        data = load_texts(
            path,
            config=spec.config,
            folder=spec.source == "textfolder",
            train_split=spec.train_split,
            test_split=spec.test_split,
            text_column=spec.text_column,
            label_column=spec.label_columns or spec.label_column,
            kind=spec.kind if labels else "none",
            separator=spec.label_separator,
            unit=spec.text_unit,
        )
    if labels and data.kind == "none":
        raise DataError(
            "the texts have no labels",
            where="data.source",
            got=spec.source,
            hint="take another source, or a task that needs none",
        )
    return limited(data, spec)
