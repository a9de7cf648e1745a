"""What a stock encoder has behind its blocks: a classifier, a head over the vocabulary, nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimfuse.families.base import Pooler, Readout, Transform
from slimfuse.spaces import Space


@dataclass(frozen=True)
class Ending:
    """stock: the class; body: the path of its base model, "" where it is itself."""

    stock: str
    body: str

    def legs(self, config: Any) -> dict[str, str]:
        """Return the legs of its parameters."""
        raise NotImplementedError

    def spaces(self, config: Any) -> list[Space]:
        """Return the spaces that only its legs name."""
        raise NotImplementedError

    def places(self, config: Any) -> dict[str, Any]:
        """Return what of `Layout` it says."""
        raise NotImplementedError

    def products(self, config: Any, tokens: int) -> int:
        """Return the multiply-adds of one sample."""
        raise NotImplementedError


@dataclass(frozen=True)
class Classifier(Ending):
    """A linear layer on one token, or on `copies` pooled streams side by side."""

    head: str = "classifier"
    readout: Readout = 0
    copies: int = 1

    def legs(self, config: Any) -> dict[str, str]:
        """Return the legs of the head."""
        read = "_resid" if self.copies == 1 else "(=pooled _resid)"
        return {f"{self.head}.weight": f"=classes {read}", f"{self.head}.bias": "=classes"}

    def spaces(self, config: Any) -> list[Space]:
        """Return the classes, and how many streams are read."""
        classes = [Space("classes", config.num_labels, "fixed")]
        return classes + ([Space("pooled", self.copies, "fixed")] if self.copies > 1 else [])

    def places(self, config: Any) -> dict[str, Any]:
        """Return the head and what it reads."""
        return {"head": self.head, "readout": self.readout}

    def products(self, config: Any, tokens: int) -> int:
        """Return the multiply-adds of the head."""
        return int(self.copies * config.hidden_size * config.num_labels)


@dataclass(frozen=True)
class PooledClassifier(Ending):
    """A linear layer on the first token's pooled stream; the pooler is as wide as the stream."""

    head: str
    pooler: Pooler

    def legs(self, config: Any) -> dict[str, str]:
        """Return the legs of the pooler and the head."""
        return {
            f"{self.pooler.dense}.weight": f"^{self.pooler.space} _resid",
            f"{self.pooler.dense}.bias": f"^{self.pooler.space}",
            f"{self.head}.weight": f"=classes _{self.pooler.space}",
            f"{self.head}.bias": "=classes",
        }

    def spaces(self, config: Any) -> list[Space]:
        """Return the classes and the pooler's units, which are hidden ones like an MLP's."""
        return [
            Space("classes", config.num_labels, "fixed"),
            Space(self.pooler.space, config.hidden_size, "mlp"),
        ]

    def places(self, config: Any) -> dict[str, Any]:
        """Return pooler and head."""
        return {"head": self.head, "readout": 0, "pooler": self.pooler}

    def products(self, config: Any, tokens: int) -> int:
        """Return the multiply-adds of pooler and head, on one token."""
        return int(config.hidden_size * (config.hidden_size + config.num_labels))


@dataclass(frozen=True)
class NoHead(Ending):
    """The stream itself, behind its last norm.

    pooler: path of the layer that the class has on its first token, "" for none. Nothing reads
    it; it is as wide as the stream, and then in its space, or of a width that stays.
    """

    readout: Readout
    pooler: str = ""

    def legs(self, config: Any) -> dict[str, str]:
        """Return the legs of the pooler."""
        if not self.pooler:
            return {}
        unit = "^resid" if self._width(config) == config.hidden_size else "=pool"
        return {f"{self.pooler}.weight": f"{unit} _resid", f"{self.pooler}.bias": unit}

    def spaces(self, config: Any) -> list[Space]:
        """Return the pooler's units where they aren't the stream's."""
        width = self._width(config)
        own = self.pooler and width != config.hidden_size
        return [Space("pool", width, "fixed")] if own else []

    def places(self, config: Any) -> dict[str, Any]:
        """Return what is read, and the pooler that isn't."""
        unread = None
        if self.pooler:
            activation = activations(getattr(config, "pooler_act", "tanh"))
            unread = Pooler(self.pooler, "", activation)
        return {"head": "", "readout": self.readout, "unread": unread}

    def products(self, config: Any, tokens: int) -> int:
        """Return the multiply-adds of the pooler, on one token."""
        return int(config.hidden_size * self._width(config)) if self.pooler else 0

    def _width(self, config: Any) -> int:
        return int(getattr(config, "pooler_output_size", None) or config.hidden_size)


@dataclass(frozen=True)
class WordHead(Ending):
    """Logits over the vocabulary for every token: norm(activation(dense x)) times the embeddings.

    table: the embeddings, which write what the norm behind the dense layer is read by: that
    product pairs them, so the norm is called their reader, and it carries the factor of copies.
    space: of the table's channels and the dense layer's units. act: the config's key of the
    activation, or its name.
    """

    dense: str
    norm: str
    head: str
    bias: str
    act: str = "gelu"

    def legs(self, config: Any) -> dict[str, str]:
        """Return the legs of the transform and of the head's bias."""
        space = self.space(config)
        return {
            f"{self.dense}.weight": f"^{space} _resid",
            f"{self.dense}.bias": f"^{space}",
            f"{self.norm}.weight": f"_{space}",
            f"{self.norm}.bias": f"_{space}",
            self.bias: "=vocab",
        }

    def space(self, config: Any) -> str:
        """Return the space of the embeddings' channels."""
        return "resid" if self._width(config) == config.hidden_size else "embed"

    def spaces(self, config: Any) -> list[Space]:
        """Return none: the embeddings name them all."""
        return []

    def places(self, config: Any) -> dict[str, Any]:
        """Return transform and head."""
        activation = activations(getattr(config, self.act, self.act))
        transform = Transform(self.dense, self.norm, activation)
        return {"head": self.head, "readout": "all", "transform": transform, "tied": True}

    def products(self, config: Any, tokens: int) -> int:
        """Return the multiply-adds of transform and head, on every token."""
        return int(tokens * self._width(config) * (config.hidden_size + config.vocab_size))

    def _width(self, config: Any) -> int:
        return int(getattr(config, "embedding_size", None) or config.hidden_size)


def text_endings(
    stock: str, body: str, classifier: tuple[str, Pooler], words: WordHead, *, pooler: bool = True
) -> dict[str, Ending]:
    """Return what a text encoder has behind its blocks, by task.

    stock: what its classes' names begin with; body: the path of the base model in those with a
    head; pooler: whether the base model has one of its own.
    """
    head, before = classifier
    alone = NoHead(f"{stock}Model", "", "mean", "pooler.dense" if pooler else "")
    return {
        "text-classification": PooledClassifier(
            f"{stock}ForSequenceClassification", body, head, before
        ),
        "masked-lm": words,
        "sentence-embedding": alone,
        "feature-extraction": alone,
    }


def image_endings(
    stock: str, body: str, *, readout: Readout = 0, copies: int = 1, pooler: bool = True
) -> dict[str, Ending]:
    """Return what an image encoder has behind its blocks, by task, see `text_endings`."""
    return {
        "image-classification": Classifier(
            f"{stock}ForImageClassification", body, readout=readout, copies=copies
        ),
        "feature-extraction": NoHead(f"{stock}Model", "", 0, "pooler.dense" if pooler else ""),
    }


def activations(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation by the name that configs use."""
    from transformers.activations import ACT2FN

    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found
