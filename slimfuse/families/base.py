"""What a family declares: its legs, its legal shapes, and where its blocks keep their parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from slimfuse.spaces import Atlas

NormOrder = Literal["pre", "post"]
NormKind = Literal["layer", "rms"]
Readout = int | Literal["last", "mean", "all", "first+mean"]


@dataclass(frozen=True)
class Shape:
    """The sizes that may shrink, in units; `inner` sizes of a head follow from the class."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    num_hidden_layers: int

    def __str__(self) -> str:
        return (
            f"{self.hidden_size} wide, {self.num_hidden_layers} deep, "
            f"{self.num_attention_heads} heads, MLP {self.intermediate_size}"
        )


@dataclass(frozen=True)
class Block:
    """One pre-norm block, x + f(norm(x)): module paths from the model's root, names of its spaces.

    mlp: the module that makes the branch, `down` in it, or the one that makes what `down` reads.
    gate: of a gated MLP, the reader whose activation multiplies what `up` makes; units are those
    products. group_space: of the query heads that share a key head (grouped queries); head_space
    is then of the key heads. q_norm, k_norm: what every head's queries and keys go through, each
    with a gain that all heads share. attention_post, mlp_post: of a sandwich, x + post(f(norm(x))),
    the norms of what the branches write. kind: of attention, where a model has several; heads move
    between blocks of one kind.
    """

    norm_order: ClassVar[NormOrder] = "pre"

    path: str
    attention: str
    attention_norm: str
    q: str
    k: str
    v: str
    o: str
    mlp: str
    mlp_norm: str
    up: str
    down: str
    head_space: str
    qk_space: str
    vo_space: str
    mlp_space: str
    gate: str = ""
    group_space: str = ""
    q_norm: str = ""
    k_norm: str = ""
    attention_post: str = ""
    mlp_post: str = ""
    kind: str = ""

    def post(self, part: str) -> str:
        """Return the norm of what a part (o or down) writes, "" where there is none."""
        return self.attention_post if part == "o" else self.mlp_post


@dataclass(frozen=True)
class PostNormBlock(Block):
    """One post-norm block, norm(x + f(x)): each norm stands behind the addition of its branch."""

    norm_order: ClassVar[NormOrder] = "post"


@dataclass(frozen=True)
class Pooler:
    """A hidden layer between the stream and the head: activation(dense(stream)).

    dense: path of the linear layer; space: of its units, which the head reads.
    """

    dense: str
    space: str
    activation: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Transform:
    """What stands between the stream and a head over the vocabulary: norm(activation(dense x))."""

    dense: str
    norm: str
    activation: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """Where a model's stream starts, runs and is read.

    embed_parameters write the first stream linearly; in a post-norm model embed_norm stands
    behind them. readout: the token whose stream the head reads, or how it reads several
    (`walk.pooled`), through `final_norm` in a pre-norm model ("" in a post-norm one) and through
    `pooler` where there is one. norm: what the norms divide by, the deviation of the channels
    (layer) or their root mean square (rms). tied: the head's weight is the first of
    embed_parameters. projection: the linear layer that writes the first stream of a post-norm
    model whose embeddings have a width of their own; then there is no embed_norm. kept: what of
    such embeddings, and of other parts that don't shrink, the target takes from the first parent.
    embed_scale: what the class multiplies the first of embed_parameters by, as an embedding.
    head: "" where there is none, and the model gives its last hidden state. unread: a pooler on
    the first token of such a model, which nothing reads. transform: what a head over the
    vocabulary reads the stream through. prefix: the tokens before those that a mean is over;
    pool_first: final_norm stands behind the pooling, not before it.
    """

    stream_space: str
    embed_parameters: tuple[str, ...]
    blocks: tuple[Block, ...]
    final_norm: str
    head: str
    readout: Readout
    embed_norm: str = ""
    pooler: Pooler | None = None
    norm: NormKind = "layer"
    tied: bool = False
    projection: str = ""
    kept: tuple[str, ...] = ()
    embed_scale: float = 1.0
    unread: Pooler | None = None
    transform: Transform | None = None
    prefix: int = 0
    pool_first: bool = False

    @property
    def norm_order(self) -> NormOrder:
        """Where the norms stand: before what reads the stream, or behind what writes it."""
        return self.blocks[0].norm_order

    def norm_at(self, depth: int) -> str:
        """Return the norm that a post-norm stream has left; depths as in `Union.checkpoints`."""
        if depth == 0:
            return self.embed_norm
        block = self.blocks[(depth - 1) // 2]
        return block.attention_norm if depth % 2 else block.mlp_norm


class Family(Protocol):
    """One model family. Configs and models are transformers' own."""

    name: str

    def atlas(self, config: Any) -> Atlas:
        """Return the legs of every parameter of a model with this config."""

    def layout(self, config: Any) -> Layout:
        """Return where the model keeps the parts that a refit visits."""

    def shape(self, config: Any) -> Shape:
        """Return the sizes of a model with this config."""

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape`; raises ShapeError when it isn't legal."""

    def new_config(self, shape: Shape, *args: Any, **inputs: Any) -> Any:
        """Return the config of a model that is to be trained from scratch.

        inputs: labels, and what the family has to know of its inputs, all by name.
        """

    def head_dims(self, config: Any) -> int:
        """Return the units of one head (query/key and value alike)."""

    def query_scale(self, parent: Any, target: Any) -> float:
        """Return the factor on queries that keeps the scores when the head size changes."""

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised stock model in evaluation mode."""

    def load_config(self, folder: str, revision: str | None = None) -> Any:
        """Return the config of a saved model; raises ParentError."""

    def load(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model in evaluation mode, strictly; raises ParentError."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a model as the stock class' own files, safetensors only."""

    def stock_form(self, model: nn.Module) -> nn.Module:
        """Return the model as its stock class has it, which is exported."""

    def flops(self, config: Any, tokens: int | None = None) -> int:
        """Return the floating-point operations of one sample (2 per multiply-add).

        tokens: of a text; None for the most that the model takes, and for images.
        """

    def mismatches(self, configs: dict[str, Any]) -> list[str]:
        """Return what keeps models with these configs from being fused, one line each."""


class ImageFamily(Family, Protocol):
    """A family of images.

    interpolates: whether it takes images of other sizes than its config's.
    """

    interpolates: bool

    def tokens(self, config: Any) -> int:
        """Return how many tokens an image becomes."""


class TextFamily(Family, Protocol):
    """A family of texts."""

    def first_position(self, config: Any) -> int:
        """Return the place of a text's first token among the positions."""
