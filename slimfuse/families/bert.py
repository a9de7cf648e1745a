"""Hugging Face BERT (Devlin et al. 2019, arXiv 1810.04805): post-norm, pooled first token."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfuse.errors import ParentError, ShapeError, first_line
from slimfuse.families.base import Layout, Pooler, PostNormBlock, Shape
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
            initializer_range=_start(shape.hidden_size),
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
        limits = self.shape(config)
        for key in Shape.__dataclass_fields__:
            if getattr(shape, key) > getattr(limits, key):
                raise ShapeError(
                    f"{key} of the target is larger than the parents'",
                    where=f"target.{key}",
                    got=getattr(shape, key),
                    allowed=f"1 … {getattr(limits, key)}",
                )
        width, heads = shape.hidden_size, shape.num_attention_heads
        legal = range(2 * heads, limits.hidden_size + 1, heads)
        if not legal:
            raise ShapeError(
                "a head needs at least two units",
                where="target.num_attention_heads",
                got=f"{heads} heads, hidden_size up to {limits.hidden_size}",
                allowed=f"num_attention_heads up to {limits.hidden_size // 2}",
            )
        if width not in legal:
            near = sorted(sorted(legal, key=lambda w: abs(w - width))[:2])
            raise ShapeError(
                "hidden_size must be a multiple of num_attention_heads, with at least two units "
                "a head",
                where="target.hidden_size",
                got=f"hidden_size {width}, num_attention_heads {heads}",
                allowed=f"hidden_size {' or '.join(map(str, near))}",
            )
        narrowed = copy.deepcopy(config)
        narrowed.initializer_range = _start(width)  # for the random-start control
        for key in Shape.__dataclass_fields__:
            setattr(narrowed, key, getattr(shape, key))
        return narrowed

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model."""
        from transformers import BertForSequenceClassification

        config = copy.deepcopy(config)
        config._attn_implementation = attention
        model: nn.Module = BertForSequenceClassification(config).eval()
        return model

    def load_config(self, folder: str, revision: str | None = None) -> Any:
        """Return the config of a saved BERT encoder."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ParentError(
                "the parent can't be opened",
                where=str(folder),
                got=first_line(error),
                hint="give a folder with config.json and model.safetensors, or a hub id if online",
            ) from error
        if config.model_type != "bert":
            raise ParentError(
                "the parent is of another family",
                where=str(folder),
                got=config.model_type,
                allowed="bert",
            )
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
        from safetensors import SafetensorError
        from transformers import BertForSequenceClassification

        self.load_config(str(folder), revision)
        try:
            model, info = BertForSequenceClassification.from_pretrained(
                folder,
                revision=revision,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
                attn_implementation=attention,
                dtype=torch.float32,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ParentError(
                "the parent's weights can't be read",
                where=str(folder),
                got=first_line(error),
                hint="the file may be cut off or not safetensors: fetch or save it again",
            ) from error
        wrong = {k: sorted(v)[:5] for k, v in info.items() if v}
        if wrong:
            raise ParentError(
                "the parent's weights don't fit its config",
                where=str(folder),
                got="; ".join(f"{k}: {v}" for k, v in wrong.items()),
                hint="fine-tune and save it as BertForSequenceClassification first",
            )
        loaded: nn.Module = model.eval()
        return loaded

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
        (first, base), *others = configs.items()
        keys = (
            "vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act",
            "layer_norm_eps",
        )  # fmt: skip
        lines = []
        for name, config in others:
            for key in keys:
                a, b = getattr(base, key), getattr(config, key)
                if a != b:
                    lines.append(f"{key}: {first} has {a}, {name} has {b}")
        return lines


def _start(width: int) -> float:
    return round(math.sqrt(2 / (5 * width)), 4)


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
