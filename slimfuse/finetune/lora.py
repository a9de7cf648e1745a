"""Low-rank adapters (peft) that are trained in place of the weights, and merged into them behind.

Source: Hu et al. 2022 (LoRA, arXiv 2106.09685), section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@contextmanager
def adapted(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    whole: Sequence[str] = (),
) -> Iterator[None]:
    """Let only adapters of the blocks' linear layers be trained: W + (alpha / rank) B A.

    blocks: paths; whole: paths of modules that are trained as they are; all else is frozen. Behind
    it B A is added to W and the adapters are gone, so that the model is of its stock class again;
    after an error they stay, and the model isn't of use.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(name.startswith(f"{b}.") for b in blocks)
    ]
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    for path in whole:
        model.get_submodule(path).requires_grad_(True)
    yield
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    for name, layer in layers.items():
        layer.merge()
        home, _, own = name.rpartition(".")
        setattr(model.get_submodule(home), own, layer.get_base_layer())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
