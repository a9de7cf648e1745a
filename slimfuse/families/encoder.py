"""What encoders share: the legs and the places of their blocks and of their tokens.

Encoders of texts are post-norm, encoders of images pre-norm. What stands behind the blocks depends
on the task, see `endings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from slimfuse.errors import ParentError
from slimfuse.families.base import Block, Layout, PostNormBlock, Shape
from slimfuse.families.endings import Ending, NoHead, WordHead
from slimfuse.families.hf import StockFamily
from slimfuse.spaces import Atlas, Space


def block_legs(block: Block) -> dict[str, str]:
    """Return the legs of all weights and biases of a block: k reads what q writes, o what v does.

    A score pairs queries and keys, so either of them may be called the reader.
    """
    head, qk, vo, mlp = block.head_space, block.qk_space, block.vo_space, block.mlp_space
    readers = {
        block.q: f"(^{head} ^{qk})",
        block.k: f"(^{head} _{qk})",
        block.v: f"(^{head} ^{vo})",
        block.up: f"^{mlp}",
    }
    writers = {block.o: f"(_{head} _{vo})", block.down: f"_{mlp}"}
    legs: dict[str, str] = {}
    for path, units in readers.items():
        legs |= {f"{path}.weight": f"{units} _resid", f"{path}.bias": units}
    for path, units in writers.items():
        legs |= {f"{path}.weight": f"^resid {units}", f"{path}.bias": "^resid"}
    return legs | norm_legs(block.attention_norm) | norm_legs(block.mlp_norm)


def norm_legs(path: str, space: str = "resid") -> dict[str, str]:
    """Return the legs of a LayerNorm."""
    return {f"{path}.weight": f"^{space}", f"{path}.bias": f"^{space}"}


class Encoder(StockFamily):
    """An encoder whose blocks are alike.

    stem: of block {i} in the class' base model; parts: where a block keeps its parts, by their
    names in `Block`; endings: what stands behind the blocks, by task.
    """

    stem: str
    parts: ClassVar[Mapping[str, str]]
    kind: ClassVar[type[Block]]
    endings: ClassVar[Mapping[str, Ending]]
    head_space: str = "head.{i}"

    def __init__(self, task: str = "") -> None:
        """Take the stock class of a task, the first one's where it isn't said."""
        self.ending = self.endings[task or next(iter(self.endings))]
        self.stock, self.body = self.ending.stock, self.ending.body
        self.optional = self._optional()

    def path(self, name: str) -> str:
        """Return the path of a part of the base model."""
        return f"{self.body}.{name}" if self.body else name

    def block(self, i: int) -> Block:
        """Return where block i keeps its parts."""
        path = self.path(self.stem.format(i=i))
        return self.kind(
            path=path,
            head_space=self.head_space.format(i=i),
            qk_space=f"qk.{i}",
            vo_space=f"vo.{i}",
            mlp_space=f"mlp.{i}",
            **{part: f"{path}.{name}" for part, name in self.parts.items()},
        )

    def legs(self, block: Block) -> dict[str, str]:
        """Return the legs of all parameters of a block."""
        return block_legs(block)

    def blocks(self, config: Any) -> tuple[Block, ...]:
        """Return all blocks."""
        return tuple(self.block(i) for i in range(config.num_hidden_layers))

    def embeddings(self, name: str) -> str:
        """Return the path of a part of the embeddings."""
        return self.path(f"embeddings.{name}")

    def tables(self, config: Any) -> dict[str, str]:
        """Return the legs of what writes the first stream."""
        raise NotImplementedError

    def ends(self, config: Any) -> dict[str, str]:
        """Return the legs of what stands before the blocks beside it, and behind them."""
        return self.ending.legs(config)

    def spaces(self, config: Any) -> list[Space]:
        """Return the spaces that `tables` and `ends` name."""
        return [*self.ending.spaces(config), Space("resid", config.hidden_size, "stream")]

    def atlas(self, config: Any) -> Atlas:
        """Return the legs of every parameter."""
        legs, spaces = self.tables(config) | self.ends(config), self.spaces(config)
        heads, dims = config.num_attention_heads, self.head_dims(config)
        for block in self.blocks(config):
            own = self.legs(block)
            if not getattr(config, "qkv_bias", True):
                own = {k: v for k, v in own.items() if k not in _biases(block.q, block.k, block.v)}
            legs |= own
            spaces += [
                Space(block.head_space, heads, "head"),
                Space(block.qk_space, dims, "qk"),
                Space(block.vo_space, dims, "vo"),
                Space(block.mlp_space, self.shape(config).intermediate_size, "mlp"),
            ]
        return Atlas.declare(legs, spaces)

    def products(self, config: Any, tokens: int) -> int:
        """Return the multiply-adds of all blocks: matrices and attention."""
        shape, inner = self.shape(config), config.num_attention_heads * self.head_dims(config)
        width = shape.hidden_size
        block = 4 * width * inner + 2 * width * shape.intermediate_size + 2 * tokens * inner
        return int(tokens * block * shape.num_hidden_layers)

    def _optional(self) -> tuple[str, ...]:
        """Return the parameters that a saved model may lack: those that nothing reads."""
        pooler = self.ending.pooler if isinstance(self.ending, NoHead) else ""
        return (f"{pooler}.weight", f"{pooler}.bias") if pooler else ()


class TextEncoder(Encoder):
    """A post-norm encoder of tokens.

    Inputs are token ids (batch, tokens) and, of padded ones, their mask. types: whether segments
    are told apart.
    """

    kind = PostNormBlock
    stem = "encoder.layer.{i}"
    parts: ClassVar = {
        "attention": "attention",
        "attention_norm": "attention.output.LayerNorm",
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "mlp": "intermediate",
        "mlp_norm": "output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
    }
    types: bool = True
    heads: tuple[str, ...] = (
        "classifier.", "cls.", "lm_head.", "qa_outputs.", "pooler.", "pre_classifier.",
    )  # fmt: skip
    alike: tuple[str, ...] = (
        "vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps",
    )  # fmt: skip

    def tables(self, config: Any) -> dict[str, str]:
        """Return the legs of the embeddings, all one space behind them."""
        kinds = {"word": "=vocab", "position": "=positions"} | (
            {"token_type": "=types"} if self.types else {}
        )
        return {
            self.embeddings(f"{kind}_embeddings.weight"): f"{leg} ^resid"
            for kind, leg in kinds.items()
        }

    def ends(self, config: Any) -> dict[str, str]:
        """Return the legs of the first norm, and of what stands behind the blocks."""
        return norm_legs(self.embeddings("LayerNorm")) | super().ends(config)

    def spaces(self, config: Any) -> list[Space]:
        """Return the spaces of the tables, the stream and the ending."""
        found = [
            Space("vocab", config.vocab_size, "fixed"),
            Space("positions", config.max_position_embeddings, "fixed"),
            *super().spaces(config),
        ]
        return found + ([Space("types", config.type_vocab_size, "fixed")] if self.types else [])

    def layout(self, config: Any) -> Layout:
        """Return where the parts are."""
        return Layout(
            stream_space="resid",
            embed_parameters=tuple(self.tables(config)),
            blocks=self.blocks(config),
            final_norm="",
            embed_norm=self.embeddings("LayerNorm"),
            **self.ending.places(config),
        )

    def first_position(self, config: Any) -> int:
        """Return the place of a text's first token among the positions."""
        return 0

    def new_config(
        self,
        shape: Shape,
        *,
        vocab_size: int,
        positions: int,
        labels: Sequence[str] = (),
        **keys: Any,
    ) -> Any:
        """Return a config for training from scratch.

        vocab_size: tokens; positions: the longest text; keys: others of the class' config.
        """
        config = self.fresh_config(shape, labels, vocab_size=vocab_size, **keys)
        config.max_position_embeddings = positions + self.first_position(config)
        return config

    def check(self, config: Any, where: str) -> None:
        """Raise ParentError for a decoder and for positions that aren't a table."""
        keys = {
            "is_decoder": False,
            "add_cross_attention": False,
            "position_embedding_type": "absolute",
        }
        if isinstance(self.ending, WordHead) and not config.tie_word_embeddings:
            raise ParentError(
                "the parent's head has a table of its own",
                where=where,
                got="tie_word_embeddings False",
                allowed="tie_word_embeddings True: a head that shares the embeddings' table",
            )
        found = {key: getattr(config, key, value) for key, value in keys.items()}
        if found != keys:
            raise ParentError(
                "the parent isn't an encoder with absolute positions",
                where=where,
                got=_listed(found),
                allowed=_listed(keys),
            )

    def flops(self, config: Any, tokens: int | None = None) -> int:
        """Return 2 x the multiply-adds of one text: matrices and attention products.

        tokens: its length; None for the longest the model takes.
        """
        tokens = tokens or config.max_position_embeddings - self.first_position(config)
        return 2 * (self.products(config, tokens) + self.ending.products(config, tokens))


class ImageEncoder(Encoder):
    """A pre-norm encoder of square or oblong patches, with tokens of its own before them.

    own_tokens: their names.
    """

    kind = Block
    stem = "layers.{i}"
    parts: ClassVar = {
        "attention": "attention",
        "attention_norm": "layernorm_before",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "mlp": "mlp",
        "mlp_norm": "layernorm_after",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    own_tokens: tuple[str, ...] = ("cls_token",)
    interpolates: bool = False
    heads: tuple[str, ...] = (
        "classifier.", "pooler.", "decoder.", "cls_classifier.", "distillation_classifier.",
    )  # fmt: skip
    alike: tuple[str, ...] = (
        "image_size", "patch_size", "num_channels", "hidden_act", "qkv_bias",
    )  # fmt: skip

    def tables(self, config: Any) -> dict[str, str]:
        """Return the legs of the tokens, the positions and the patches' projection."""
        names = dict.fromkeys(self.own_tokens, "=one =one ^resid") | {
            "position_embeddings": "=one =positions ^resid",
            "patch_embeddings.projection.weight": "^resid =channels =rows =columns",
            "patch_embeddings.projection.bias": "^resid",
        }
        return {self.embeddings(name): legs for name, legs in names.items()}

    def ends(self, config: Any) -> dict[str, str]:
        """Return the legs of the last norm and the head."""
        return norm_legs(self.path("layernorm")) | super().ends(config)

    def spaces(self, config: Any) -> list[Space]:
        """Return the spaces of the patches, the tokens, the stream and the head."""
        rows, columns = _pair(config.patch_size)
        return [
            Space("one", 1, "fixed"),
            Space("positions", self.tokens(config), "fixed"),
            Space("channels", config.num_channels, "fixed"),
            Space("rows", rows, "fixed"),
            Space("columns", columns, "fixed"),
            *super().spaces(config),
        ]

    def layout(self, config: Any) -> Layout:
        """Return where the parts are."""
        return Layout(
            stream_space="resid",
            embed_parameters=tuple(self.tables(config)),
            blocks=self.blocks(config),
            final_norm=self.path("layernorm"),
            **self.ending.places(config),
        )

    def new_config(
        self,
        shape: Shape,
        *,
        patch_size: int,
        image_size: int,
        labels: Sequence[str] = (),
        **keys: Any,
    ) -> Any:
        """Return a config for training from scratch, RGB input; keys: others of the class."""
        sides = {"patch_size": patch_size, "image_size": image_size, "num_channels": 3}
        return self.fresh_config(shape, labels, **sides, **keys)

    def head_dims(self, config: Any) -> int:
        """Return hidden_size / num_attention_heads, or the `head_dim` a config may carry."""
        return int(getattr(config, "head_dim", super().head_dims(config)))

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape`; ShapeError names the nearest legal width."""
        narrowed = super().narrow(config, shape)
        if getattr(config, "pooler_output_size", None) == config.hidden_size:
            narrowed.pooler_output_size = shape.hidden_size  # the class' own default: its width
        if hasattr(narrowed, "head_dim"):  # stock configs don't know the key
            del narrowed.head_dim
        return narrowed

    def patches(self, config: Any) -> int:
        """Return how many patches an image has."""
        (height, width), (rows, columns) = _pair(config.image_size), _pair(config.patch_size)
        return (height // rows) * (width // columns)

    def tokens(self, config: Any) -> int:
        """Return how many tokens an image becomes."""
        return self.patches(config) + len(self.own_tokens)

    def flops(self, config: Any, tokens: int | None = None) -> int:
        """Return 2 x the multiply-adds of one image: matrices and attention products.

        tokens: a text's; those of an image follow from its config.
        """
        rows, columns = _pair(config.patch_size)
        pixels = config.num_channels * rows * columns
        ends = self.patches(config) * pixels * config.hidden_size
        own = self.tokens(config)
        return 2 * int(self.products(config, own) + ends + self.ending.products(config, own))


def _biases(*paths: str) -> tuple[str, ...]:
    return tuple(f"{path}.bias" for path in paths)


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items())


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    """Return height and width of a size that may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
