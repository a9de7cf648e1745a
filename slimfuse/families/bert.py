"""Hugging Face BERT (Devlin et al. 2019, arXiv 1810.04805): post-norm, pooled first token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfuse.errors import ParentError
from slimfuse.families.base import Layout, Pooler, PostNormBlock, Shape
from slimfuse.families.hf import (
    differences,
    narrowed_config,
    read_config,
    read_model,
    starting_deviation,
)
from slimfuse.spaces import Atlas, Space

TABLES = {
    "bert.embeddings.word_embeddings.weight": "=vocab ^resid",
    "bert.embeddings.position_embeddings.weight": "=positions ^resid",
    "bert.embeddings.token_type_embeddings.weight": "=types ^resid",
}
ENDS = {
    "bert.embeddings.LayerNorm.weight": "^resid",
    "bert.embeddings.LayerNorm.bias": "^resid",
    "bert.pooler.dense.weight": "^pool _resid",
    "bert.pooler.dense.bias": "^pool",
    "classifier.weight": "=classes _pool",
    "classifier.bias": "=classes",
}
# k reads what q writes: the score pairs them; o reads what v writes
LAYER = {
    "attention.self.query.weight": "(^head.{i} ^qk.{i}) _resid",
    "attention.self.query.bias": "(^head.{i} ^qk.{i})",
    "attention.self.key.weight": "(^head.{i} _qk.{i}) _resid",
    "attention.self.key.bias": "(^head.{i} _qk.{i})",
    "attention.self.value.weight": "(^head.{i} ^vo.{i}) _resid",
    "attention.self.value.bias": "(^head.{i} ^vo.{i})",
    "attention.output.dense.weight": "^resid (_head.{i} _vo.{i})",
    "attention.output.dense.bias": "^resid",
    "attention.output.LayerNorm.weight": "^resid",
    "attention.output.LayerNorm.bias": "^resid",
    "intermediate.dense.weight": "^mlp.{i} _resid",
    "intermediate.dense.bias": "^mlp.{i}",
    "output.dense.weight": "^resid _mlp.{i}",
    "output.dense.bias": "^resid",
    "output.LayerNorm.weight": "^resid",
    "output.LayerNorm.bias": "^resid",
}


class Bert:
    """`BertForSequenceClassification` with any width, depth, heads and MLP width.

    Inputs are token ids (batch, tokens), of one length and unpadded. The pooler is as wide as the
    stream: the class knows no other.
    """

    name = "bert"

    def atlas(self, config: Any) -> Atlas:
        """Return the legs of every parameter."""
        patterns = dict(TABLES)
        spaces = [
            Space("vocab", config.vocab_size, "fixed"),
            Space("positions", config.max_position_embeddings, "fixed"),
            Space("types", config.type_vocab_size, "fixed"),
            Space("classes", config.num_labels, "fixed"),
            Space("resid", config.hidden_size, "stream"),
            Space("pool", config.hidden_size, "mlp"),  # hidden units, like an MLP's
        ]
        for i in range(config.num_hidden_layers):
            patterns |= {f"{_layer(i)}.{k}": p.format(i=i) for k, p in LAYER.items()}
            spaces += [
                Space(f"head.{i}", config.num_attention_heads, "head"),
                Space(f"qk.{i}", self.head_dims(config), "qk"),
                Space(f"vo.{i}", self.head_dims(config), "vo"),
                Space(f"mlp.{i}", config.intermediate_size, "mlp"),
            ]
        return Atlas.declare(patterns | ENDS, spaces)

    def layout(self, config: Any) -> Layout:
        """Return where the parts are."""
        return Layout(
            stream_space="resid",
            embed="bert.embeddings",
            embed_parameters=tuple(TABLES),
            blocks=tuple(_block(i) for i in range(config.num_hidden_layers)),
            final_norm="",
            head="classifier",
            readout=0,
            embed_norm="bert.embeddings.LayerNorm",
            pooler=Pooler("bert.pooler.dense", "pool", torch.tanh),
        )

    def shape(self, config: Any) -> Shape:
        """Return the sizes that may shrink."""
        return Shape(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.num_hidden_layers,
        )

    def new_config(
        self,
        shape: Shape,
        *,
        vocab_size: int,
        positions: int,
        labels: Sequence[str],
        types: int = 2,
        pad: int | None = 0,
    ) -> Any:
        """Return a config for training from scratch.

        vocab_size: tokens; positions: the longest sequence; types: kinds of segments; pad: the
        token whose embedding isn't trained, None for none. Weights start as a new ViT's.
        """
        from transformers import BertConfig

        return BertConfig(
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            type_vocab_size=types,
            pad_token_id=pad,
            initializer_range=starting_deviation(shape.hidden_size),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )

    def head_dims(self, config: Any) -> int:
        """Return hidden_size / num_attention_heads: the class knows no other."""
        return int(config.hidden_size // config.num_attention_heads)

    def query_scale(self, parent: Any, target: Any) -> float:
        """Return √(d_target / d_parent): undoes the class' own division by √head_dim."""
        return float((self.head_dims(target) / self.head_dims(parent)) ** 0.5)

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape`; ShapeError names the nearest legal width."""
        return narrowed_config(config, shape, self.shape(config))

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model."""
        from transformers import BertForSequenceClassification

        config = copy.deepcopy(config)
        config._attn_implementation = attention
        model: nn.Module = BertForSequenceClassification(config).eval()
        return model

    def load_config(self, folder: str, revision: str | None = None) -> Any:
        """Return the config of a saved BERT encoder."""
        config = read_config(folder, "bert", revision)
        relative = getattr(config, "position_embedding_type", "absolute")
        if config.is_decoder or config.add_cross_attention or relative != "absolute":
            raise ParentError(
                "the parent isn't an encoder with absolute positions",
                where=str(folder),
                got=f"is_decoder {config.is_decoder}, add_cross_attention "
                f"{config.add_cross_attention}, position_embedding_type {relative}",
                allowed="is_decoder False, add_cross_attention False, absolute positions",
            )
        return config

    def load(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model; a missing or unexpected weight is an error."""
        from transformers import BertForSequenceClassification

        self.load_config(str(folder), revision)
        return read_model(
            BertForSequenceClassification, folder, attention=attention, revision=revision
        )

    def flops(self, config: Any, tokens: int | None = None) -> int:
        """Return 2 x the multiply-adds of one sequence: matrices and attention products.

        tokens: its length; None for the longest the model takes.
        """
        tokens, d = tokens or config.max_position_embeddings, config.hidden_size
        block = 4 * d * d + 2 * d * config.intermediate_size + 2 * tokens * d
        total = tokens * block * config.num_hidden_layers
        return int(2 * (total + d * d + d * config.num_labels))

    def mismatches(self, configs: dict[str, Any]) -> list[str]:
        """Compare vocabulary, positions, types, activation and norm of the parents."""
        keys = (
            "vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act",
            "layer_norm_eps",
        )  # fmt: skip
        return differences(configs, keys)


def _layer(i: int) -> str:
    return f"bert.encoder.layer.{i}"


def _block(i: int) -> PostNormBlock:
    layer = _layer(i)
    return PostNormBlock(
        path=layer,
        attention=f"{layer}.attention",
        attention_norm=f"{layer}.attention.output.LayerNorm",
        q=f"{layer}.attention.self.query",
        k=f"{layer}.attention.self.key",
        v=f"{layer}.attention.self.value",
        o=f"{layer}.attention.output.dense",
        mlp=f"{layer}.intermediate",
        mlp_norm=f"{layer}.output.LayerNorm",
        up=f"{layer}.intermediate.dense",
        down=f"{layer}.output.dense",
        head_space=f"head.{i}",
        qk_space=f"qk.{i}",
        vo_space=f"vo.{i}",
        mlp_space=f"mlp.{i}",
    )
