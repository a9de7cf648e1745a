"""Hugging Face ViT (Dosovitskiy et al. 2021, arXiv 2010.11929): pre-norm, class token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slimfuse.families.base import Block, Layout, Shape
from slimfuse.families.hf import (
    differences,
    narrowed_config,
    read_config,
    read_model,
    starting_deviation,
)
from slimfuse.spaces import Atlas, Space

EMBEDDINGS = {
    "vit.embeddings.cls_token": "=one =one ^resid",
    "vit.embeddings.position_embeddings": "=one =positions ^resid",
    "vit.embeddings.patch_embeddings.projection.weight": "^resid =channels =rows =columns",
    "vit.embeddings.patch_embeddings.projection.bias": "^resid",
}
HEAD = {
    "vit.layernorm.weight": "^resid",
    "vit.layernorm.bias": "^resid",
    "classifier.weight": "=classes _resid",
    "classifier.bias": "=classes",
}
# k reads what q writes: the score pairs them; o reads what v writes
LAYER = {
    "layernorm_before.weight": "^resid",
    "layernorm_before.bias": "^resid",
    "attention.q_proj.weight": "(^head.{i} ^qk.{i}) _resid",
    "attention.q_proj.bias": "(^head.{i} ^qk.{i})",
    "attention.k_proj.weight": "(^head.{i} _qk.{i}) _resid",
    "attention.k_proj.bias": "(^head.{i} _qk.{i})",
    "attention.v_proj.weight": "(^head.{i} ^vo.{i}) _resid",
    "attention.v_proj.bias": "(^head.{i} ^vo.{i})",
    "attention.o_proj.weight": "^resid (_head.{i} _vo.{i})",
    "attention.o_proj.bias": "^resid",
    "layernorm_after.weight": "^resid",
    "layernorm_after.bias": "^resid",
    "mlp.fc1.weight": "^mlp.{i} _resid",
    "mlp.fc1.bias": "^mlp.{i}",
    "mlp.fc2.weight": "^resid _mlp.{i}",
    "mlp.fc2.bias": "^resid",
}
QKV_BIAS = ("attention.q_proj.bias", "attention.k_proj.bias", "attention.v_proj.bias")


class ViT:
    """`ViTForImageClassification` with any width, depth, heads and MLP width."""

    name = "vit"

    def atlas(self, config: Any) -> Atlas:
        """Return the legs of every parameter."""
        patterns = dict(EMBEDDINGS)
        spaces = [
            Space("one", 1, "fixed"),
            Space("positions", self._patches(config) + 1, "fixed"),
            Space("channels", config.num_channels, "fixed"),
            Space("rows", config.patch_size, "fixed"),
            Space("columns", config.patch_size, "fixed"),
            Space("classes", config.num_labels, "fixed"),
            Space("resid", config.hidden_size, "stream"),
        ]
        for i in range(config.num_hidden_layers):
            patterns |= {
                f"vit.layers.{i}.{k}": p.format(i=i)
                for k, p in LAYER.items()
                if config.qkv_bias or k not in QKV_BIAS
            }
            spaces += [
                Space(f"head.{i}", config.num_attention_heads, "head"),
                Space(f"qk.{i}", self.head_dims(config), "qk"),
                Space(f"vo.{i}", self.head_dims(config), "vo"),
                Space(f"mlp.{i}", config.intermediate_size, "mlp"),
            ]
        return Atlas.declare(patterns | HEAD, spaces)

    def layout(self, config: Any) -> Layout:
        """Return where the parts are."""
        return Layout(
            stream_space="resid",
            embed="vit.embeddings",
            embed_parameters=tuple(EMBEDDINGS),
            blocks=tuple(_block(i) for i in range(config.num_hidden_layers)),
            final_norm="vit.layernorm",
            head="classifier",
            readout=0,
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
        self, shape: Shape, *, patch_size: int, image_size: int, labels: Sequence[str]
    ) -> Any:
        """Return a config for training from scratch, RGB input.

        Weights start with variance 2/(5·width) (Nguyen & Salazar 2019, arXiv 1910.05895): the
        class' own 0.02 suits width 768 and learns slowly in narrow models.
        """
        from transformers import ViTConfig

        return ViTConfig(
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            patch_size=patch_size,
            image_size=image_size,
            num_channels=3,
            initializer_range=starting_deviation(shape.hidden_size),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )

    def head_dims(self, config: Any) -> int:
        """Return hidden_size / num_attention_heads, or the `head_dim` a config may carry."""
        return int(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))

    def query_scale(self, parent: Any, target: Any) -> float:
        """Return √(d_target / d_parent): undoes the class' own division by √head_dim."""
        return float((self.head_dims(target) / self.head_dims(parent)) ** 0.5)

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape`; ShapeError names the nearest legal width."""
        narrowed = narrowed_config(config, shape, self.shape(config))
        if getattr(config, "pooler_output_size", None) == config.hidden_size:
            narrowed.pooler_output_size = shape.hidden_size  # the class' own default: its width
        if hasattr(narrowed, "head_dim"):  # older stock versions don't know the key
            del narrowed.head_dim
        return narrowed

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model."""
        from transformers import ViTForImageClassification

        config = copy.deepcopy(config)
        config._attn_implementation = attention
        model: nn.Module = ViTForImageClassification(config).eval()
        return model

    def load_config(self, folder: str, revision: str | None = None) -> Any:
        """Return the config of a saved ViT."""
        return read_config(folder, "vit", revision)

    def load(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model; a missing or unexpected weight is an error."""
        from transformers import ViTForImageClassification

        self.load_config(str(folder), revision)
        return read_model(ViTForImageClassification, folder, attention=attention, revision=revision)

    def flops(self, config: Any) -> int:
        """Return 2 x the multiply-adds of one image: matrices and attention products."""
        tokens, d = self._patches(config) + 1, config.hidden_size
        pixels = config.num_channels * config.patch_size**2
        inner = config.num_attention_heads * self.head_dims(config)
        block = 4 * d * inner + 2 * d * config.intermediate_size + 2 * tokens * inner
        total = (tokens - 1) * pixels * d + tokens * block * config.num_hidden_layers
        return int(2 * (total + d * config.num_labels))

    def mismatches(self, configs: dict[str, Any]) -> list[str]:
        """Compare image, patch, activation and norm of the parents."""
        keys = (
            "image_size", "patch_size", "num_channels", "hidden_act", "layer_norm_eps", "qkv_bias",
        )  # fmt: skip
        return differences(configs, keys)

    @staticmethod
    def _patches(config: Any) -> int:
        return int((config.image_size // config.patch_size) ** 2)


def _block(i: int) -> Block:
    layer = f"vit.layers.{i}"
    return Block(
        path=layer,
        attention=f"{layer}.attention",
        attention_norm=f"{layer}.layernorm_before",
        q=f"{layer}.attention.q_proj",
        k=f"{layer}.attention.k_proj",
        v=f"{layer}.attention.v_proj",
        o=f"{layer}.attention.o_proj",
        mlp=f"{layer}.mlp",
        mlp_norm=f"{layer}.layernorm_after",
        up=f"{layer}.mlp.fc1",
        down=f"{layer}.mlp.fc2",
        head_space=f"head.{i}",
        qk_space=f"qk.{i}",
        vo_space=f"vo.{i}",
        mlp_space=f"mlp.{i}",
    )
