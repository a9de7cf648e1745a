"""What families of Hugging Face classes share: reading, narrowing and comparing configs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slimfuse.errors import ParentError, ShapeError, first_line
from slimfuse.families.base import Shape


def starting_deviation(width: int) -> float:
    """Return √(2 / 5·width): the initial deviation that suits narrow models, too.

    Source: Nguyen & Salazar 2019 (arXiv 1910.05895).
    """
    return round(math.sqrt(2 / (5 * width)), 4)


def narrowed_config(config: Any, shape: Shape, limits: Shape) -> Any:
    """Return a copy of `config` with `shape`; ShapeError names the nearest legal width.

    limits: the sizes of `config`, which no size may pass; hidden_size must be a multiple of
    num_attention_heads with at least two units a head.
    """
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
            "hidden_size must be a multiple of num_attention_heads, with at least two units a head",
            where="target.hidden_size",
            got=f"hidden_size {width}, num_attention_heads {heads}",
            allowed=f"hidden_size {' or '.join(map(str, near))}",
        )
    narrowed = copy.deepcopy(config)
    narrowed.initializer_range = starting_deviation(width)  # for the random-start control
    for key in Shape.__dataclass_fields__:
        setattr(narrowed, key, getattr(shape, key))
    return narrowed


def read_config(folder: str, model_type: str, revision: str | None = None) -> Any:
    """Return the config of a saved model of this type; raises ParentError."""
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
    if config.model_type != model_type:
        raise ParentError(
            "the parent is of another family",
            where=str(folder),
            got=config.model_type,
            allowed=model_type,
        )
    return config


def read_model(
    stock: Any, folder: str | Path, *, attention: str, revision: str | None = None
) -> nn.Module:
    """Return a saved model of a stock class in evaluation mode, strictly; raises ParentError.

    Weights are memory-mapped. A missing, unexpected or misshapen weight is an error.
    """
    import torch
    from safetensors import SafetensorError

    try:
        model, info = stock.from_pretrained(
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
            hint=f"fine-tune and save it as {stock.__name__} first",
        )
    broken = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        raise ParentError(
            "the parent's weights hold nan or inf",
            where=str(folder),
            got=", ".join(broken[:5]),
            hint="take an earlier checkpoint of its training",
        )
    loaded: nn.Module = model.eval()
    return loaded


def differences(configs: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Return a line for every key in which a config differs from the first."""
    (first, base), *others = configs.items()
    return [
        f"{key}: {first} has {getattr(base, key)}, {name} has {getattr(config, key)}"
        for name, config in others
        for key in keys
        if getattr(base, key) != getattr(config, key)
    ]
