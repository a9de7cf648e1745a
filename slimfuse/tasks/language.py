"""Language models: the next token of a text, or those that are masked in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, token_mask
from slimfuse.data import Split
from slimfuse.tasks.base import Augmentation, Evidence, Measures, Samples
from slimfuse.tasks.blocks import Blocks
from slimfuse.tasks.metrics import Metric, perplexity, share
from slimfuse.tasks.texts import IDS, TextSamples, TextTask, load_tokenizer

IGNORED = -100
EXCERPT_TOKENS = 16  # of a text whose logits are kept beside a model
ROWS = 512  # tokens whose logits are reduced at a time


class LanguageTask(TextTask):
    """What both kinds share: logits (n, tokens, vocabulary), labels (n, tokens), −100 elsewhere.

    joins: whether texts are joined and cut into blocks of one length; ahead: how far behind a
    place the token stands that is asked for there.
    """

    metrics = (Metric("perplexity", "lower", share=False), Metric("token_accuracy"))
    batch_size = 8
    cached = labelled = by_class = False
    joins = True
    ahead = 0
    sample = "block"

    def packing(self, packed: bool) -> Self:
        """Return the task with texts joined, or one by one."""
        found = copy.copy(self)
        found.joins = packed
        return found._named()

    def truncating(self, length: int) -> Self:
        """Return the task with samples of so many tokens at most, blocks of so many exactly."""
        return super().truncating(length)._named()

    def _named(self) -> Self:
        block = "block" if self.length is None else f"{self.length}-token block"
        self.sample = block if self.joins else "text"
        return self

    def samples(self, split: Split, preprocessor: Any, *, uniform: bool = False) -> TextSamples:
        """Return blocks of the split's texts, or the texts one by one."""
        if self.joins:
            return Blocks(split, preprocessor, self.length or preprocessor.model_max_length)
        return super().samples(split, preprocessor, uniform=uniform)

    def rows(self, output: Tensor, inputs: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (r, vocabulary) of the tokens that have labels, and those (r,)."""
        counted = labels != IGNORED
        return output[counted], labels[counted]

    def reduce(self, output: Tensor, inputs: Batch, labels: Tensor) -> Evidence:
        """Return each text's sum of −log p, how often the best guess was right, and its tokens."""
        nll, hits = torch.zeros(2, *labels.shape, dtype=torch.float64)
        counted = labels != IGNORED
        places = counted.nonzero()
        for part in places.split(ROWS):
            rows, wanted = output[part[:, 0], part[:, 1]], labels[part[:, 0], part[:, 1]]
            told = nn.functional.cross_entropy(rows, wanted, reduction="none")
            nll[part[:, 0], part[:, 1]] = told.double()
            hits[part[:, 0], part[:, 1]] = (rows.argmax(1) == wanted).double()
        return {"nll": nll.sum(1), "hits": hits.sum(1), "tokens": counted.sum(1).double()}

    def measures(self, evidence: Evidence, reference: Tensor | None = None) -> Measures:
        """Return perplexity and the share of right guesses, over all counted tokens."""
        counts = evidence["tokens"]
        return {
            "perplexity": lambda: perplexity(evidence["nll"], counts),
            "token_accuracy": lambda: share(evidence["hits"], counts),
        }

    def excerpt(self, batch: Batch) -> Batch:
        """Return the texts' beginnings."""
        return Batch({k: v[:, :EXCERPT_TOKENS] for k, v in batch.arguments.items()})


class CausalLanguageModelling(LanguageTask):
    """Every token from those before it."""

    name = "causal-lm"
    tag = "text-generation"
    usage = """\
inputs = preprocessor("A text", return_tensors="pt")
print(preprocessor.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
    auto_model = "AutoModelForCausalLM"
    ahead = 1

    def load(self, folder: Path) -> Any:
        """Return the saved tokenizer; where it has no padding token, texts end in its own end."""
        return load_tokenizer(folder)

    def examples(
        self, samples: Samples, indices: Tensor, kinds: Sequence[Augmentation] | None = None
    ) -> tuple[Batch, Tensor]:
        """Return texts and, at each token, the next one."""
        inputs = samples[indices]
        ids, mask = inputs.arguments[IDS], token_mask(inputs)
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        if mask is not None:
            labels[:, :-1][~mask[:, 1:]] = IGNORED
        return inputs, labels


class MaskedLanguageModelling(LanguageTask):
    """Masked tokens from all others.

    Of 15 % of the tokens that aren't special, 80 % become the mask, 10 % any token, 10 % stay
    (Devlin et al. 2019, arXiv 1810.04805, section 3.1): anew in every step of training, always
    the same in measuring.
    """

    name = "masked-lm"
    tag = "fill-mask"
    auto_model = "AutoModelForMaskedLM"
    share = 0.15

    def examples(
        self, samples: Samples, indices: Tensor, kinds: Sequence[Augmentation] | None = None
    ) -> tuple[Batch, Tensor]:
        """Return masked texts and, where something was asked for, the tokens themselves."""
        inputs = samples[indices]
        ids, shape = inputs.arguments[IDS], inputs.arguments[IDS].shape
        if kinds is None:
            draws = torch.stack([_draws(int(i), shape[1]) for i in indices])
            chance, kind, other = draws.unbind(2)
        else:
            chance, kind, other = torch.rand(3, *shape)
        tokenizer: Any = getattr(samples, "tokenizer")  # noqa: B009 - not every Samples has one
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        mask = token_mask(inputs)
        asked = (chance < self.share) & ~special
        if mask is not None:
            asked &= mask
        labels = torch.where(asked, ids, IGNORED)
        spoilt = torch.where(kind < 0.8, tokenizer.mask_token_id, ids)
        anything = (other * len(tokenizer)).long().clamp_max(len(tokenizer) - 1)
        spoilt = torch.where((kind >= 0.8) & (kind < 0.9), anything, spoilt)
        changed = dict(inputs.arguments) | {IDS: torch.where(asked, spoilt, ids)}
        return Batch(changed), labels


def _draws(sample: int, tokens: int) -> Tensor:
    """Return numbers in 0 … 1 (tokens, 3) that depend on the sample and the token's place alone."""
    return torch.from_numpy(np.random.default_rng(sample).random((tokens, 3)))
