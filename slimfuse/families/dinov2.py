"""Hugging Face DINOv2 (Oquab et al. 2023, arXiv 2304.07193): a ViT whose branches are scaled.

LayerScale (Touvron et al. 2021, arXiv 2103.17239) multiplies what a branch writes by λ, one a
channel. λ (W h + b) = (diag(λ) W) h + λ b, so a loaded model has its λ in what writes to the
stream, and ones in their place: the same function, and what the blocks of a ViT add.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from slimfuse.errors import ParentError, ShapeError
from slimfuse.families.adopting import Adopting
from slimfuse.families.base import Block, Shape
from slimfuse.families.encoder import ImageEncoder
from slimfuse.families.endings import image_endings

SCALES = {"layer_scale1": "o", "layer_scale2": "down"}
"""The scale behind each branch, and the part of a block that writes it."""


class Dinov2(Adopting):
    """DINOv2: its head reads class token and mean patch, both normed.

    The MLP's width is a whole multiple of the stream's: the config knows no other.
    """

    name = "dinov2"
    interpolates = True
    endings: ClassVar = image_endings(
        "Dinov2", "dinov2", readout="first+mean", copies=2, pooler=False
    )
    stem = "encoder.layer.{i}"
    parts: ClassVar = {
        **ImageEncoder.parts,
        "attention_norm": "norm1",
        "mlp_norm": "norm2",
    }

    def shape(self, config: Any) -> Shape:
        """Return the sizes that may shrink."""
        return Shape(
            config.hidden_size,
            config.num_attention_heads,
            int(config.hidden_size * config.mlp_ratio),
            config.num_hidden_layers,
        )

    def sizes(self, shape: Shape) -> dict[str, int]:
        """Return a shape by the config's keys; raises ShapeError for a broken mlp_ratio."""
        ratio, rest = divmod(shape.intermediate_size, shape.hidden_size)
        if rest or not ratio:
            raise ShapeError(
                "intermediate_size must be a multiple of hidden_size: the class knows only ratios",
                where="target.intermediate_size",
                got=f"intermediate_size {shape.intermediate_size}, hidden_size {shape.hidden_size}",
                allowed=f"intermediate_size {max(1, ratio) * shape.hidden_size}",
            )
        return {
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "mlp_ratio": ratio,
            "num_hidden_layers": shape.num_hidden_layers,
        }

    def tables(self, config: Any) -> dict[str, str]:
        """Return the legs of a ViT's tables and of the token that stands for masked patches."""
        mask = {self.embeddings("mask_token"): "=one ^resid"} if config.use_mask_token else {}
        return super().tables(config) | mask

    def legs(self, block: Block) -> dict[str, str]:
        """Return the legs of all parameters of a block, its scales, too."""
        scales = {f"{block.path}.{scale}.lambda1": "^resid" for scale in SCALES}
        return super().legs(block) | scales

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape` and scales of 1; else ShapeError."""
        narrowed = super().narrow(config, shape)
        narrowed.layerscale_value = 1.0
        # what a backbone of the old depth gives out is no stage of the new one
        stages = range(1, shape.num_hidden_layers + 1)
        narrowed.stage_names = ["stem", *(f"stage{i}" for i in stages)]
        narrowed.set_output_features_output_indices(None, None)
        return narrowed

    def check(self, config: Any, where: str) -> None:
        """Raise ParentError for gated MLPs."""
        if config.use_swiglu_ffn:
            raise ParentError(
                "DINOv2 with gated MLPs isn't known",
                where=where,
                got="use_swiglu_ffn True",
                allowed="use_swiglu_ffn False",
            )

    def load(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model in evaluation mode, its scales in what writes; else ParentError."""
        model = super().load(folder, attention=attention, revision=revision)
        self.fold(model)
        return model

    def fold(self, model: Any) -> None:
        """Multiply what writes to the stream by the scale behind it, which becomes 1, in place."""
        with torch.no_grad():
            for block in self.blocks(model.config):
                for scale, part in SCALES.items():
                    factor = model.get_parameter(f"{block.path}.{scale}.lambda1")
                    writer = model.get_submodule(getattr(block, part))
                    writer.weight.mul_(factor[:, None])
                    writer.bias.mul_(factor)
                    factor.fill_(1)
