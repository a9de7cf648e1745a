"""timm itself: its models by name or folder, and what one is made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimfuse.errors import ParentError, UserError, first_line

POOLS = ("token", "avg")
ACTIVATIONS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
"""transformers' names of GELU, by what torch calls its approximation."""


def create(name: str, *, where: str = "", **arguments: Any) -> nn.Module:
    """Return timm's model with random weights, in evaluation mode.

    name: an architecture, or `local-dir:FOLDER` for that of a folder's config.json. Raises
    UserError without timm, ParentError for what timm can't build.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "timm models need the package timm",
            where=where or None,
            got=first_line(error),
            hint="pip install -c constraints.txt timm",
        ) from error
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments).eval()
    except (RuntimeError, TypeError, KeyError, AssertionError, OSError, ValueError) as error:
        raise ParentError(
            "timm can't build the model", where=where or name, got=first_line(error)
        ) from error
    return model


def stock_class() -> Any:
    """Return timm's class."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


def described(model: Any, where: str) -> dict[str, Any]:
    """Return the choices of `TimmConfig` that make this model; raises ParentError for others.

    where: of the model, for the error.
    """
    odd = _odd(model)
    if odd:
        raise ParentError(
            "the timm model has parts that aren't known",
            where=where,
            got="; ".join(odd),
            allowed="timm's plain ViT and DeiT: class or average pooling, LayerScale, registers",
        )
    block, record = model.blocks[0], dict(model.pretrained_cfg)
    names = record.get("label_names") or [f"LABEL_{i}" for i in range(model.num_classes)]
    listed = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
    if len(listed) != model.num_classes:
        listed = [f"LABEL_{i}" for i in range(model.num_classes)]
    behind = not isinstance(model.fc_norm, nn.Identity)
    return {
        "architecture": record["architecture"],
        "hidden_size": model.embed_dim,
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(model.blocks),
        "image_size": _side(model.patch_embed.img_size),
        "patch_size": _side(model.patch_embed.patch_size),
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "class_token": model.cls_token is not None,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": model.no_embed_class,
        "global_pool": model.global_pool,
        "fc_norm": behind,
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": _activation(block.mlp.act),
        "id2label": dict(enumerate(listed)),
        "label2id": {label: i for i, label in enumerate(listed)},
        "pretrained_cfg": {k: v for k, v in record.items() if k not in _LEFT_OUT and v is not None},
    }


_LEFT_OUT = ("architecture", "file", "source", "url", "hf_hub_id", "label_names", "state_dict")
"""What of timm's record tells of the saved file, or is kept under a name of its own."""


def _odd(model: Any) -> list[str]:
    """Return what of a model the family doesn't know, one line each."""
    if type(model) is not stock_class():
        return [f"class {type(model).__name__}"]
    found = []
    if model.global_pool not in POOLS or model.pool_include_prefix:
        found.append(f"global_pool {model.global_pool!r}")
    if model.pos_embed is None:
        found.append("no table of positions")
    if not isinstance(model.norm_pre, nn.Identity):
        found.append("pre_norm")
    if not isinstance(model.patch_embed.proj, nn.Conv2d) or model.patch_embed.proj.bias is None:
        found.append(f"patches by {type(model.patch_embed.proj).__name__} without a bias")
    if isinstance(model.norm, nn.LayerNorm) == isinstance(model.fc_norm, nn.LayerNorm):
        found.append(f"last norms {type(model.norm).__name__}, {type(model.fc_norm).__name__}")
    for block in model.blocks:
        parts = (block, *(getattr(block, part, None) for part in ("attn", "mlp", "norm1")))
        names = [type(part).__name__ for part in parts]
        if names != ["Block", "Attention", "Mlp", "LayerNorm"]:
            found.append(f"blocks of {', '.join(names)}")
            break
        norms = {"qk_norm": block.attn.q_norm, "scale_mlp_norm": block.mlp.norm}
        norms["scale_attn_norm"] = getattr(block.attn, "norm", nn.Identity())
        found += [name for name, norm in norms.items() if not isinstance(norm, nn.Identity)]
        if getattr(block.attn, "gate", None) is not None:
            found.append("gated attention")
        if block.attn.proj.bias is None or block.mlp.fc2.bias is None:
            found.append("proj_bias False")
        if found:
            break
    return found


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return ACTIVATIONS[module.approximate]
    return type(module).__name__


def _side(size: Any) -> Any:
    """Return one number for the sides of a square."""
    height, width = (int(n) for n in size)
    return height if height == width else (height, width)
