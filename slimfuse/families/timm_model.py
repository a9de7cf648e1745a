"""timm's ViT as families see it: a config, and the working form of its model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimfuse.families.adopting import TIMM
from slimfuse.families.working import merge_linear, split_linear

PLAIN = "vit_base_patch16_224"
"""The name under which a model of any sizes is saved that has none of its own."""


@dataclass
class TimmConfig:
    """What timm's class is built with, under the names of transformers' configs.

    architecture: timm's name of the model, whose norms and activation it has. global_pool: token
    or avg. fc_norm: the last norm stands behind the pooling. pretrained_cfg: timm's record of the
    preprocessing and of where the weights come from. initializer_range: of random weights.
    """

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    architecture: str = PLAIN
    num_channels: int = 3
    qkv_bias: bool = True
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    global_pool: str = "token"
    fc_norm: bool = False
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    id2label: dict[int, str] = field(default_factory=dict)
    label2id: dict[str, int] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    model_type: ClassVar[str] = TIMM

    @property
    def num_labels(self) -> int:
        """How many classes there are, 0 without a head."""
        return len(self.id2label)

    def arguments(self) -> dict[str, Any]:
        """Return `model_args`: what timm.create_model needs beside the number of classes.

        The MLP's width is int(embed_dim · mlp_ratio), so half a unit keeps it from rounding down;
        init_values 0 is no LayerScale, where None would be the architecture's own.
        """
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "in_chans": self.num_channels,
            "global_pool": self.global_pool,
            "embed_dim": self.hidden_size,
            "depth": self.num_hidden_layers,
            "num_heads": self.num_attention_heads,
            "mlp_ratio": (self.intermediate_size + 0.5) / self.hidden_size,
            "qkv_bias": self.qkv_bias,
            "init_values": 0.0,
            "class_token": self.class_token,
            "reg_tokens": self.reg_tokens,
            "no_embed_class": self.no_embed_class,
            "fc_norm": self.fc_norm,
            "dynamic_img_size": False,
        }


class TimmModel(nn.Module):
    """timm's model with the outputs of transformers' classes: logits, or the last hidden state."""

    def __init__(self, model: nn.Module, config: TimmConfig) -> None:
        """Take timm's model and what it is."""
        super().__init__()
        self.timm = model
        self.config = config

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> Any:
        """Return the output for images (batch, channels, height, width).

        output_hidden_states: also give the stream before the first block and after each.
        """
        from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

        model: Any = self.timm
        hidden: list[Tensor] = []
        hooks = []
        if output_hidden_states:
            hooks = [b.register_forward_pre_hook(_keep(hidden)) for b in model.blocks]
            hooks.append(model.blocks.register_forward_hook(lambda _m, _x, y: hidden.append(y)))
        try:
            features = model.forward_features(pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
        seen = tuple(hidden) or None
        if isinstance(model.head, nn.Identity):
            return BaseModelOutput(last_hidden_state=features, hidden_states=seen)
        return ImageClassifierOutput(logits=model.forward_head(features), hidden_states=seen)


def working(model: nn.Module, config: TimmConfig) -> TimmModel:
    """Return timm's model with its projections apart and its LayerScales folded, in place."""
    stock: Any = model
    with torch.no_grad():
        for block in stock.blocks:
            qkv = block.attn.qkv
            block.attn.qkv = split_linear(qkv.weight, qkv.bias, ("q", "k", "v"))
            for scale, writer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
                module = getattr(block, scale)
                if not isinstance(module, nn.Identity):
                    writer.weight.mul_(module.gamma[:, None])
                    writer.bias.mul_(module.gamma)
                    setattr(block, scale, nn.Identity())
    return TimmModel(model, config).eval()


def stock(model: nn.Module) -> TimmModel:
    """Return a copy of a working form that holds timm's own modules."""
    copied: Any = copy.deepcopy(model)
    for block in copied.timm.blocks:
        weight, bias = merge_linear(block.attn.qkv)
        merged = split_linear(weight, bias, ("all",))
        (block.attn.qkv,) = merged.parts
    found: TimmModel = copied
    return found


def _keep(seen: list[Tensor]) -> Any:
    return lambda _module, inputs: seen.append(inputs[0])
