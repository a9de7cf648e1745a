"""Embeddings without labels: sentence embeddings, and features of texts and of images.

What the parents say is the target. A model's embedding may be of any width, so figures compare
similarities: of pairs of held-out samples, and which samples are near each other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, token_mask
from slimfuse.data import DataSet
from slimfuse.tasks.base import Evidence, Measures, Task
from slimfuse.tasks.criteria import Direction
from slimfuse.tasks.image_classification import ImageTask
from slimfuse.tasks.metrics import Measured, Metric, bootstrap, rank_correlation
from slimfuse.tasks.texts import TextTask

NEIGHBOURS = 10
MOST_QUERIES = 2000  # samples whose neighbours are looked up
METRICS = (Metric("spearman", share=False), Metric("neighbour_overlap"))
Pooling = Literal["mean", "cls"]
USAGE = """\
texts = ["a text", "another, longer text"]
inputs = preprocessor(texts, padding=True, truncation=True, return_tensors="pt")
"""
POOLED: dict[Pooling, str] = {
    "mean": """\
states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
embeddings = (states * mask).sum(1) / mask.sum(1)  # cosines of these are similarities""",
    "cls": """\
embeddings = model(**inputs).last_hidden_state[:, 0]  # cosines of these are similarities""",
}
"""How sentence encoders make one state of a text's, for a model's card."""


def mean_pooled(states: Tensor, inputs: Batch, prefix: int = 0) -> Tensor:
    """Return the mean (n, d) of last hidden states (n, tokens, d) of the real tokens.

    prefix: tokens at the beginning that don't count.
    """
    states, mask = states[:, prefix:], token_mask(inputs)
    if mask is None:
        return states.mean(1)
    share = mask[:, prefix:].to(states)[:, :, None]
    found: Tensor = (states * share).sum(1) / share.sum(1)
    return found


class _Embedding(Task):
    """What tasks of embeddings share.

    readout: the token whose state is the embedding, or the mean of all behind the first `prefix`.
    """

    output = "last_hidden_state"
    auto_model = "AutoModel"
    criterion = Direction()
    metrics = METRICS
    answers = "embeddings"
    labelled = by_class = False
    compares = True
    readout: int | Literal["mean"] = "mean"
    prefix: int = 0

    def reading(self, readout: int | Literal["mean"], prefix: int = 0) -> Self:
        """Return the task with embeddings of one token, or the mean behind some."""
        found = copy.copy(self)
        found.readout, found.prefix = readout, prefix
        return found

    def embed(self, states: Tensor, inputs: Batch) -> Tensor:
        """Return the embeddings (n, d) that last hidden states (n, tokens, d) give."""
        if self.readout == "mean":
            return mean_pooled(states, inputs, self.prefix)
        return states[:, self.readout]  # texts are padded on the right

    def rows(self, output: Tensor, inputs: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings."""
        return self.embed(output, inputs), labels

    def reduce(self, output: Tensor, inputs: Batch, labels: Tensor) -> Evidence:
        """Return the embeddings."""
        return {"embeddings": self.embed(output, inputs)}

    def gist(self, every: Sequence[Evidence], weights: Sequence[float]) -> Tensor:
        """Return the parents' joint embeddings, whose cosines are the weighted mean of theirs."""
        return self.criterion.combine([e["embeddings"] for e in every], weights, 1.0)

    def measures(self, evidence: Evidence, reference: Tensor | None = None) -> Measures:
        """Return how like the parents' a model's similarities are.

        spearman: rank correlation of cosines over disjoint random pairs of samples, which are
        independent of each other; neighbour_overlap: the mean share of a sample's 10 nearest that
        are its 10 nearest for the parents, too. Without a reference a model is its own.
        """
        own = nn.functional.normalize(evidence["embeddings"].double(), dim=1)
        wanted = own if reference is None else nn.functional.normalize(reference.double(), dim=1)
        left, right = disjoint_pairs(len(own))
        likeness = [(e[left] * e[right]).sum(1) for e in (own, wanted)]

        def shared() -> Measured:
            nearest = overlap(own, wanted)
            return bootstrap(lambda i: nearest[i].mean(), len(nearest))

        return {
            "spearman": lambda: rank_correlation(*likeness),
            "neighbour_overlap": shared,
        }


def disjoint_pairs(count: int) -> Tensor:
    """Return random pairs (2, count // 2) of samples, each in one of them at most."""
    places = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return places[: count // 2 * 2].view(2, -1)


def overlap(one: Tensor, two: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Return the share (q,) of every sample's nearest in unit embeddings that are those in others.

    Of up to 2 000 samples among all.
    """
    count = min(count, len(one) - 1)
    queries = torch.arange(min(len(one), MOST_QUERIES))
    near = []
    for embeddings in (one, two):
        likeness = embeddings[queries] @ embeddings.T
        likeness[queries, queries] = -torch.inf
        near.append(likeness.topk(count).indices)
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(2)
    return shared.double().mean(1)


class SentenceEmbedding(_Embedding, TextTask):
    """Embeddings of texts: the mean of their tokens' last states, or the first token's.

    longest: the most tokens that sentence-transformers gives the finished model, None for as many
    as its tokenizer says.
    """

    name = "sentence-embedding"
    tag = "sentence-similarity"
    usage = USAGE + POOLED["mean"]
    longest: int | None = None

    @property
    def pooling(self) -> Pooling:
        """What sentence-transformers calls the readout."""
        return "mean" if self.readout == "mean" else "cls"

    def pooled(self, pooling: Pooling, longest: int | None) -> Self:
        """Return the task with another readout and limit."""
        found = self.reading("mean" if pooling == "mean" else 0)
        found.longest, found.usage = longest, USAGE + POOLED[pooling]
        return found

    def identity(self, preprocessor: Any) -> dict[str, Any]:
        """Return what decides of the tokens, and which of their states count."""
        own = {"pooling": self.pooling, "longest": self.longest}
        return super().identity(preprocessor) | own

    def extras(self, preprocessor: Any, config: Any) -> dict[str, Any]:
        """Return what sentence-transformers reads: body, pooling, unit length, most tokens."""
        pooling = {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": self.pooling == "cls",
            "pooling_mode_mean_tokens": self.pooling == "mean",
        }
        modules = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
        return {
            "modules.json": [
                {
                    "idx": i,
                    "name": str(i),
                    "path": path,
                    "type": f"sentence_transformers.models.{kind}",
                }
                for i, (kind, path) in enumerate(modules)
            ],
            "sentence_bert_config.json": {
                "max_seq_length": int(self.longest or preprocessor.model_max_length),
                "do_lower_case": False,
            },
            "1_Pooling/config.json": pooling,
        }


class TextFeatures(_Embedding, TextTask):
    """Features of texts, token by token; judged by their mean."""

    name = "feature-extraction"


class ImageFeatures(_Embedding, ImageTask):
    """Features of images, patch by patch; judged by the class token's or the patches' mean."""

    name = "feature-extraction"
    readout = 0

    def identity(self, preprocessor: Any) -> dict[str, Any]:
        """Return what the processor does with an image, and which tokens' states count."""
        return super().identity(preprocessor) | {"readout": [self.readout, self.prefix]}


class FeatureExtraction(TextFeatures):
    """Features of texts or of images, as the data are."""

    def of(self, data: DataSet) -> Task:
        """Return the task for texts or images."""
        from slimfuse.data import ImageData

        return copy.copy(IMAGES if isinstance(data, ImageData) else TEXTS)


IMAGES, TEXTS = ImageFeatures(), TextFeatures()
