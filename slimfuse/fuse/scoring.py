"""Saliency in a fusion: every parent's units, scored without labels by the parent's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches, Inputs, token_mask
from slimfuse.families import Family, Layout
from slimfuse.fuse import walk
from slimfuse.fuse.importance import TOKENS, drawn
from slimfuse.saliency import SCORERS, Scores, Subject, score
from slimfuse.saliency.activity import second_moments
from slimfuse.saliency.losses import Features, own_answers
from slimfuse.saliency.mask_fisher import branches
from slimfuse.saliency.units import Loss
from slimfuse.saliency.ziplm import eliminate

Saliency = Literal[
    "energy", "uniform", "magnitude", "l1", "taylor", "diagonal-fisher", "mask-fisher", "ziplm",
    "random",
]  # fmt: skip
"""What a unit counts. uniform: all alike; energy: what it gives to its readers; see `SCORERS`."""

SCORED = 4 * TOKENS  # squares of gradients scatter more than their means


def by_gradients(name: Saliency) -> bool:
    """Return whether a saliency can't be told from covariances and weights at hand."""
    return name in SCORERS and SCORERS[name].reads in ("gradients", "nothing")


def subject(
    model: nn.Module, family: Family, batches: Batches, rows: int = 0, seed: int = 0
) -> Subject:
    """Return a model to be scored on a seeded draw of about `SCORED` of its `rows` tokens.

    Its loss is that of answers drawn from itself (true Fisher), without a head of its unit
    features.
    """
    layout = family.layout(model.config)
    share = SCORED / rows if rows else 1.0
    return Subject(
        model, family.atlas(model.config), layout, lambda: drawn(batches(), share),
        label_free(model, layout, seed), seed,
    )  # fmt: skip


def label_free(model: nn.Module, layout: Layout, seed: int = 0) -> Loss:
    """Return a model's loss against what it says itself."""
    if layout.head:
        config: Any = model.config
        kind = getattr(config, "problem_type", None)
        return own_answers(seed, several=kind == "multi_label_classification")

    def read(output: Any, inputs: Inputs) -> Tensor:
        return walk.pooled(layout, output.last_hidden_state, token_mask(inputs))

    return Features(read, seed)


def saliencies(
    models: Sequence[nn.Module],
    family: Family,
    batches: Batches,
    name: Saliency,
    weights: Sequence[float],
    *,
    rows: int = 0,
    seed: int = 0,
) -> list[Scores]:
    """Return every model's scores by name; nothing for "uniform", which needs none.

    Of several models each space's scores are shares of the total over all its kind (all heads, all
    MLP units, the stream), times the model's weight: losses of different models have no common
    unit.
    """
    if name not in SCORERS:
        return [{} for _ in models]
    # all draw the same answers, so that copies score alike; but random scores mustn't go in pairs
    apart = 1_000_003 if name == "random" else 0
    found = [
        score(name, subject(m, family, batches, rows, seed + apart * place))
        for place, m in enumerate(models)
    ]
    if len(models) == 1:
        return found
    shared = []
    for scores, model, weight in zip(found, models, weights, strict=True):
        atlas = family.atlas(model.config)
        kinds = {n: tuple(atlas.spaces[s].kind for s in n.split()) for n in scores}
        totals = {
            kind: sum(float(v.sum()) for n, v in scores.items() if kinds[n] == kind)
            for kind in set(kinds.values())
        }
        shared.append({n: v * (weight / (totals[kinds[n]] or 1.0)) for n, v in scores.items()})
    return shared


def cut_losses(asked: Subject, *, mended: bool = True) -> dict[str, list[float]]:
    """Return what is predicted to be lost if a model keeps only so many of each of its sizes.

    By axis of `Shape`, losses[value] for 0 … the model's size: what a shape planner splits a
    budget by (`shapes.descent`). Of units Σ of the smallest mask-Fisher scores, over all layers,
    which all shrink alike; of blocks that of their branches' masks. mended: what least squares
    would miss of what the units give their readers, times all their scores together: of the MLP
    and the heads by elimination (`ziplm`), of the stream by its principal directions.
    """
    fisher = score("mask-fisher", asked)
    attention, mlp = branches(asked)
    layout = asked.layout
    found = {"num_hidden_layers": _cut((attention + mlp).sort().values)}
    spaces = {
        "hidden_size": [layout.stream_space],
        "num_attention_heads": [b.head_space for b in layout.blocks],
        "intermediate_size": [b.mlp_space for b in layout.blocks],
    }
    costs: dict[str, Tensor] = {}
    if mended:
        for seen in second_moments(asked):
            whole = (seen.out @ seen.second * seen.out).sum().clamp_min(1e-300)
            if seen.site.name == layout.stream_space:
                spectrum = torch.linalg.eigvalsh(seen.second).clamp_min(0)
                costs[seen.site.name] = spectrum / spectrum.sum()
                continue
            for name, groups in seen.groups():
                order = eliminate(seen.second, seen.out, groups).costs
                costs[name] = torch.tensor(order, dtype=torch.float64) / whole
    for axis, names in spaces.items():
        curves = []
        for name in names:
            scores = fisher[name]
            curves.append(_cut(costs[name] * scores.sum() if mended else scores.sort().values))
        found[axis] = [sum(values) for values in zip(*curves, strict=True)]
    group = layout.blocks[0].group_space
    if group:  # query heads go with the key head that they share
        per_key, heads = asked.atlas.spaces[group].size, found["num_attention_heads"]
        every = range(per_key * (len(heads) - 1) + 1)
        found["num_attention_heads"] = [heads[n // per_key] for n in every]
    return found


def _cut(steps: Tensor) -> list[float]:
    """Return Σ of the first n − v of n steps, for v = 0 … n."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), steps.double().cumsum(0)])
    return [float(x) for x in sums.flip(0)]
