"""Torch-pruning's pruned ViTs and BERTs as folders that stock classes load."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn

from slimfuse.batch import Batch, Inputs
from slimfuse.pipeline.stages import Stages

Importance = Literal["L1", "Taylor"]
SAMPLES = 256  # labelled ones that Taylor's gradients come from


def torch_pruned(stages: Stages, parent: Path, how: Importance, folder: Path) -> Path:
    """Return the folder of a parent pruned by torch-pruning to the job's target shape.

    The stream, the heads' width and the MLPs lose the same share, each group as torch-pruning's
    dependency graph has it, by the summed importance of what goes together. `save_pretrained`
    writes the result as the stock class, whose strict loading shows that nothing is missing.
    """
    if (folder / "model.safetensors").is_file():
        return folder.resolve()
    job = stages.job
    model = job.family.load(parent, attention="eager").eval()
    wide, narrow = job.family.shape(model.config), job.family.shape(job.target)
    share = 1 - narrow.hidden_size / wide.hidden_size
    batches = labelled(stages)
    inputs = batches[0][0]
    assert isinstance(inputs, Batch)
    heads = {m: wide.num_attention_heads for n, m in model.named_modules() if _is_projection(n, m)}
    importance = (
        tp.importance.MagnitudeImportance(p=1) if how == "L1" else tp.importance.TaylorImportance()
    )
    with warnings.catch_warnings():
        # it announces the class token and the positions, whose last axis it prunes, as it must
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        pruner = tp.pruner.BasePruner(
            model, dict(inputs[:2].arguments), importance=importance, pruning_ratio=share,
            pruning_ratio_dict={
                m: 1 - narrow.intermediate_size / wide.intermediate_size
                for n, m in model.named_modules()
                if isinstance(m, nn.Linear) and m.out_features == wide.intermediate_size
            },
            ignored_layers=[model.get_submodule("classifier")], num_heads=heads,
            prune_head_dims=True, forward_fn=lambda m, x: m(**x).logits,
        )  # fmt: skip
    if how == "Taylor":
        for given, labels in batches:
            assert isinstance(given, Batch)
            nn.functional.cross_entropy(model(**given.arguments).logits, labels).backward()
    pruner.step()
    target: Any = job.family.build(job.target)
    target.load_state_dict(model.state_dict(), strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    job.processor.save_pretrained(folder)
    target.save_pretrained(folder)
    return folder.resolve()


def labelled(stages: Stages) -> Sequence[tuple[Inputs, torch.Tensor]]:
    """Return training samples with their labels, in batches."""
    samples = stages.samples("train")
    places = torch.arange(min(SAMPLES, len(samples)))
    found = [stages.job.task.examples(samples, part) for part in places.split(32)]
    return [(inputs, labels) for inputs, labels in found if labels is not None]


def _is_projection(name: str, module: nn.Module) -> bool:
    """Return whether a layer is one of an attention's that heads divide."""
    ends = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
    return isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ends
