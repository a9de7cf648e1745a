"""Start a model from a pretrained one: its body, with a new head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfuse.errors import ParentError, first_line


def begin(model: nn.Module, folder: Path) -> None:
    """Copy the body of the saved model in `folder` into `model`; its head stays as it is.

    The body is what transformers calls the base model. What the saved one lacks of it, such as a
    pooler, stays as it is, too; a weight of another shape is an error (ParentError).
    """
    body: Any = model.base_model
    try:
        saved, info = type(body).from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ParentError(
            "the pretrained model can't be read",
            where=str(folder),
            got=first_line(error),
        ) from error
    fresh = {key.removeprefix(f"{model.base_model_prefix}.") for key in info["missing_keys"]}
    state, own = saved.state_dict(), body.state_dict()
    odd = [k for k, v in own.items() if k in state and k not in fresh and state[k].shape != v.shape]
    if odd:
        raise ParentError(
            "the pretrained model has weights of other shapes",
            where=str(folder),
            got=", ".join(odd[:5]),
        )
    kept = {k: v for k, v in own.items() if k in fresh or k not in state}
    body.load_state_dict({k: state[k] for k in own if k not in kept} | kept)
