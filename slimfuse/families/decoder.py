"""What decoders of Llama's kind share: RMSNorm, gated MLP, rotary positions, grouped queries."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import nn

from slimfuse.errors import ShapeError
from slimfuse.families.base import Block, Layout, Shape
from slimfuse.families.hf import StockFamily, differences, read_config, starting_deviation
from slimfuse.spaces import Atlas, Space

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FULL = "full_attention"
LAYER = {
    "self_attn.q_proj.weight": "(^head.{i} ^group.{i} =qk) _resid",
    "self_attn.k_proj.weight": "(^head.{i} =qk) _resid",
    "self_attn.v_proj.weight": "(^head.{i} ^vo.{i}) _resid",
    "self_attn.o_proj.weight": "^resid (_head.{i} _group.{i} _vo.{i})",
    "mlp.gate_proj.weight": "^mlp.{i} _resid",
    "mlp.up_proj.weight": "^mlp.{i} _resid",
    "mlp.down_proj.weight": "^resid _mlp.{i}",
}
QKV_BIAS = {
    "self_attn.q_proj.bias": "(^head.{i} ^group.{i} =qk)",
    "self_attn.k_proj.bias": "(^head.{i} =qk)",
    "self_attn.v_proj.bias": "(^head.{i} ^vo.{i})",
}
OUTPUT_BIAS = {"self_attn.o_proj.bias": "^resid"}
MLP_BIAS = {
    "mlp.gate_proj.bias": "^mlp.{i}",
    "mlp.up_proj.bias": "^mlp.{i}",
    "mlp.down_proj.bias": "^resid",
}
QK_NORM = {"self_attn.q_norm.weight": "=qk", "self_attn.k_norm.weight": "=qk"}


class Decoder(StockFamily):
    """A causal language model of Llama's kind (arXiv 2302.13971).

    head_space is of the key heads; the query heads that share one are a group of constant size.
    The axis of queries and keys is fixed: rotary positions (arXiv 2104.09864) turn its pairs by
    their place. Inputs are token ids (batch, tokens), padded on the right if at all.
    """

    qk_norm = False
    """Whether every head's queries and keys are normed."""
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    """A block's norms of the stream, and of what branches write, by their names in `Block`."""

    @property
    def model_type(self) -> str:
        """Transformers' name of the architecture."""
        return self.name

    def qkv_bias(self, config: Any) -> bool:
        """Return whether queries, keys and values have a bias."""
        return bool(getattr(config, "attention_bias", False))

    def atlas(self, config: Any) -> Atlas:
        """Return the legs of every parameter; a tied head is the embedding."""
        layer = LAYER | {f"{norm}.weight": "^resid" for norm in self.norms.values()}
        layer |= QKV_BIAS if self.qkv_bias(config) else {}
        layer |= OUTPUT_BIAS if getattr(config, "attention_bias", False) else {}
        layer |= MLP_BIAS if getattr(config, "mlp_bias", False) else {}
        layer |= QK_NORM if self.qk_norm else {}
        patterns = {EMBEDDING: "=vocab ^resid", "model.norm.weight": "^resid"}
        if not config.tie_word_embeddings:
            patterns[HEAD] = "=vocab _resid"
        spaces = [
            Space("vocab", config.vocab_size, "fixed"),
            Space("resid", config.hidden_size, "stream"),
            Space("qk", self.head_dims(config), "fixed"),
        ]
        for i in range(config.num_hidden_layers):
            patterns |= {f"{_layer(i)}.{k}": p.format(i=i) for k, p in layer.items()}
            spaces += [
                Space(f"head.{i}", config.num_key_value_heads, "head"),
                Space(f"group.{i}", self.group(config), "head"),
                Space(f"vo.{i}", self.head_dims(config), "vo"),
                Space(f"mlp.{i}", config.intermediate_size, "mlp"),
            ]
        return Atlas.declare(patterns, spaces)

    def layout(self, config: Any) -> Layout:
        """Return where the parts are."""
        return Layout(
            stream_space="resid",
            embed_parameters=(EMBEDDING,),
            blocks=tuple(self.block(config, i) for i in range(config.num_hidden_layers)),
            final_norm="model.norm",
            head="lm_head",
            readout="all",
            norm="rms",
            tied=bool(config.tie_word_embeddings),
        )

    def block(self, config: Any, i: int) -> Block:
        """Return where block i keeps its parts."""
        layer = _layer(i)
        attention = f"{layer}.self_attn"
        kinds = getattr(config, "layer_types", None)
        return Block(
            path=layer,
            attention=attention,
            q=f"{attention}.q_proj",
            k=f"{attention}.k_proj",
            v=f"{attention}.v_proj",
            o=f"{attention}.o_proj",
            mlp=f"{layer}.mlp",
            up=f"{layer}.mlp.up_proj",
            down=f"{layer}.mlp.down_proj",
            head_space=f"head.{i}",
            qk_space="qk",
            vo_space=f"vo.{i}",
            mlp_space=f"mlp.{i}",
            gate=f"{layer}.mlp.gate_proj",
            group_space=f"group.{i}",
            q_norm=f"{attention}.q_norm" if self.qk_norm else "",
            k_norm=f"{attention}.k_norm" if self.qk_norm else "",
            kind=kinds[i] if kinds else "",
            **{part: f"{layer}.{name}" for part, name in self.norms.items()},
        )

    def new_config(
        self,
        shape: Shape,
        *,
        vocab_size: int,
        positions: int,
        key_heads: int | None = None,
        head_dim: int | None = None,
        tied: bool = False,
        **keys: Any,
    ) -> Any:
        """Return a config for training from scratch.

        vocab_size: tokens; positions: the longest sequence; key_heads: as many as heads where
        None; head_dim: units of a head, hidden_size / num_attention_heads where None; tied:
        whether the head's weight is the embedding; keys: further ones of the class' config.
        """
        from transformers import AutoConfig

        heads = shape.num_attention_heads
        return AutoConfig.for_model(
            self.model_type,
            initializer_range=starting_deviation(shape.hidden_size),
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            num_key_value_heads=key_heads or heads,
            head_dim=head_dim or shape.hidden_size // heads,
            tie_word_embeddings=tied,
            **self.sizes(shape),
            **keys,
        )

    def head_dims(self, config: Any) -> int:
        """Return `head_dim`, or hidden_size / num_attention_heads where the config says nothing."""
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)

    def group(self, config: Any) -> int:
        """Return how many query heads share a key head."""
        return int(config.num_attention_heads // config.num_key_value_heads)

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape`; head_dim and the groups' size stay.

        Of blocks with several kinds of attention see `kinds`. ShapeError where the heads aren't
        whole groups; else see `StockFamily.narrow`.
        """
        group = self.group(config)
        if shape.num_attention_heads % group:
            near = shape.num_attention_heads // group * group
            legal = [n for n in (near, near + group) if 0 < n <= config.num_attention_heads]
            raise ShapeError(
                "num_attention_heads must be a multiple of the query heads that share a key head",
                where="target.num_attention_heads",
                got=f"{shape.num_attention_heads} heads in groups of {group}",
                allowed=" or ".join(map(str, legal)),
            )
        narrowed = super().narrow(config, shape)
        narrowed.num_key_value_heads = shape.num_attention_heads // group
        narrowed.head_dim = self.head_dims(config)
        if getattr(config, "layer_types", None):
            narrowed.layer_types = kinds(config.layer_types, shape.num_hidden_layers)
        return narrowed

    def load_config(self, folder: str, revision: str | None = None) -> Any:
        """Return the config of a saved model; raises ParentError."""
        config = read_config(folder, self.model_type, revision)
        self.check(config, str(folder))
        return config

    def flops(self, config: Any, tokens: int | None = None) -> int:
        """Return 2 x the multiply-adds of one sequence: matrices and attention products.

        tokens: its length; None for the longest the model takes.
        """
        tokens, d = tokens or config.max_position_embeddings, config.hidden_size
        queries = config.num_attention_heads * self.head_dims(config)
        keys = config.num_key_value_heads * self.head_dims(config)
        block = 2 * d * (queries + keys) + 3 * d * config.intermediate_size + 2 * tokens * queries
        return int(2 * tokens * (block * config.num_hidden_layers + d * config.vocab_size))

    def mismatches(self, configs: dict[str, Any]) -> list[str]:
        """Compare vocabulary, activation, norm, positions, biases, heads' size and groups."""
        heads = {
            name: SimpleNamespace(head_dim=self.head_dims(c), query_heads_per_key=self.group(c))
            for name, c in configs.items()
        }
        return super().mismatches(configs) + differences(heads, ("head_dim", "query_heads_per_key"))


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules that holds the very same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def kinds(types: Sequence[str], depth: int) -> list[str]:
    """Return the kinds of attention of `depth` blocks that stand for those with `types`.

    A block has full attention where its even share of the blocks has one with it, which sees all
    that a window sees, and else the kind of the first of them.
    """
    count = len(types)
    shares = [types[i * count // depth : (i + 1) * count // depth] for i in range(depth)]
    return [FULL if FULL in share else share[0] for share in shares]


def _layer(i: int) -> str:
    return f"model.layers.{i}"
