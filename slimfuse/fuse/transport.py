"""Faithful mode (`method: ot`): parents moved to a trained anchor's units, averaged with it.

Sources: Imfeld et al. 2310.05719 (flow of maps through a transformer, residual policies), Singh &
Jaggi 1910.05653 (layer by layer), with the normalisation of fusion.md §1: writers move by plan/ν,
readers by plan/μ; keys, which write their head and read their units, by `key_side`.

The stream has one map per depth. Embeddings, norms and readers at a depth move with it; a branch
writes with the map of its own output units, and `residual` says which map the stream has after
the addition. Faithful to the paper, and inconsistent where these maps differ: what was written
with one map is read with another.

An exactly widened (equal numbers of copies) or permuted copy of the anchor comes back exactly from
exact plans under every residual policy, qk policy, heads mode, cost and masses. Not when:
- the plan is entropic or unbalanced, or partial below mass 1: it mixes or drops units;
- copies come in unequal numbers, except with masses by saliency (a copy's output weight falls with
  its number) inside heads and MLPs; uniform masses cut across copies, norms count each copy in
  full. The stream has no such copies: its norms count them;
- the cost ties units that differ. Correlations are blind to scale and offset, so proportional
  queries with different keys need qk "joint" or weights in the cost ("separate" moves queries and
  keys apart, "equal" merges wrong keys); units that never vary need weights in the cost;
- heads are crossed, qk is "equal", and heads share their queries under any cost: keys go astray;
- a branch writes nothing (or ties units) and residual is "none" or "mean": its map is arbitrary;
- embeddings tie units that later layers tell apart and residual is any but "none": the skip
  carries an arbitrary map on.
Before tokens mix, the class token is the same in every image: token filters that leave it alone
keep all tokens there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfuse.batch import Batches
from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Family
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.narrowing import count_rows
from slimfuse.fuse.scoring import subject
from slimfuse.fuse.transport_move import Move
from slimfuse.fuse.transport_policies import MapRecord, TransportSettings
from slimfuse.fuse.union import Parent
from slimfuse.progress import track
from slimfuse.saliency import Scores, score
from slimfuse.saliency.diagonal import traces
from slimfuse.spaces import Role

__all__ = ["MapRecord", "TransportFusion", "TransportSettings", "fuse_by_transport"]


@dataclass(frozen=True)
class TransportFusion:
    """Every map that was made, and the shares of the anchor (first) and of each parent.

    tensors: the shares of every parameter by its name, where they differ.
    """

    maps: tuple[MapRecord, ...]
    weights: tuple[float, ...]
    tensors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def fuse_by_transport(
    parents: Sequence[Parent],
    anchor: nn.Module,
    target: nn.Module,
    family: Family,
    batches: Batches,
    settings: TransportSettings,
    *,
    n_batches: int,
    scratch: Path | None = None,
) -> TransportFusion:
    """Write W = w₀ W_anchor + Σ_p w_p W~_p into `target`; return the maps and the weights.

    W~_p = E_out W_p D_in are a parent's weights moved to the anchor's units, each parent by itself.
    anchor: a trained model of the target's shape. parents: of its depth, of any widths. batches:
    gives the same unlabelled inputs (batch, …) each time it is called. Moments, plans and averages
    are float64; forward passes run in the models' own dtype. Raises ParentError and ShapeError.
    """
    _check(parents, anchor, target, family)
    weights = _shares([p.weight for p in parents], settings.anchor_weight)
    passes = 1 + 2 * len(family.layout(anchor.config).blocks)
    total = len(parents) * passes * n_batches if settings.needs_activations else len(parents)
    tensors, scores = _weighed(parents, anchor, family, batches, settings, weights)
    fused = {
        n: tensors.get(n, weights)[0] * p.double().cpu() for n, p in anchor.state_dict().items()
    }
    records: list[MapRecord] = []
    with torch.no_grad(), track("moving parents to the anchor", total) as tell:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            tell(done)

        for place, parent in enumerate(parents, start=1):
            with StreamCache(folder=scratch) as cache:
                both = (scores[place], scores[0]) if scores else None
                move = Move(parent, anchor, family, settings, tick, cache, both)
                for name, value in move.run(batches()).items():
                    fused[name] += tensors.get(name, weights)[place] * value
            records += move.records
            if not settings.needs_activations:
                tick()
        for name, parameter in target.named_parameters():
            parameter.copy_(fused[name])
    return TransportFusion(tuple(records), tuple(weights), tensors)


def _weighed(
    parents: Sequence[Parent],
    anchor: nn.Module,
    family: Family,
    batches: Batches,
    settings: TransportSettings,
    weights: Sequence[float],
) -> tuple[dict[str, tuple[float, ...]], list[Scores]]:
    """Return the shares of every tensor, and the units' scores, as far as they are asked for.

    The anchor's are the first of both. Tensors: share · trace, of all models together 1.
    """
    models = [anchor, *(p.model for p in parents)]
    tensors: dict[str, tuple[float, ...]] = {}
    fisher = settings.parent_weights == "fisher"
    if not (fisher or settings.scored):
        return {}, []
    rows = count_rows(anchor, family.layout(anchor.config), batches())
    if fisher:
        seen = [subject(m, family, batches, 4 * rows, settings.seed) for m in models]
        scales = [coordinate_scales(family, m.config, anchor.config) for m in models]
        found = [traces(own, scale) for own, scale in zip(seen, scales, strict=True)]
        for name in found[0]:
            parts = [w * f[name] for w, f in zip(weights, found, strict=True)]
            total = sum(parts)
            tensors[name] = tuple(p / total for p in parts) if total > 0 else tuple(weights)
    if not settings.scored:
        return tensors, []
    asked = [subject(m, family, batches, rows, settings.seed) for m in models]
    return tensors, [score(settings.saliency, one) for one in asked]


def coordinate_scales(family: Family, config: Any, anchor: Any) -> dict[str, float]:
    """Return by how much a tensor's squared gradients grow in the anchor's coordinates.

    What writes n units into m of the anchor's stands for n/m copies of each: a step of the moved
    tensor is a step of all of them, so its gradient is their sum, n/m times one's. Readers share
    theirs out among the copies, whose gradients are alike. Exact for units that were copied
    equally often; queries also carry the scale of their scores.
    """
    atlas, narrow = family.atlas(config), family.atlas(anchor)
    queries = {f"{block.q}.{part}" for block in family.layout(config).blocks
               for part in ("weight", "bias")}  # fmt: skip
    found = {}
    for name, axes in atlas.axes.items():
        copies = prod(
            atlas.spaces[leg.space].size / narrow.spaces[leg.space].size
            for axis in axes
            for leg in axis
            if leg.role is Role.WRITE
        )
        scale = family.query_scale(config, anchor) if name in queries else 1.0
        found[name] = (copies / scale) ** 2
    return found


def _shares(parents: Sequence[float], anchor: float | None) -> list[float]:
    """Return the anchor's and the parents' weights, which sum to 1."""
    total = sum(parents)
    own = 1 / (1 + total) if anchor is None else anchor
    return [own, *((1 - own) * w / total for w in parents)]


def _check(parents: Sequence[Parent], anchor: nn.Module, target: nn.Module, family: Family) -> None:
    if not parents:
        raise ParentError("there is no parent to move to the anchor", where="parents")
    if family.layout(anchor.config).norm_order == "post":
        raise ParentError(
            "transport to an anchor knows pre-norm models only",
            got=f"family {family.name}",
            hint="use the refit (slimfuse.fuse.refit)",
        )
    shape, wanted = (family.shape(m.config) for m in (anchor, target))
    if shape != wanted:
        raise ShapeError(
            "the anchor hasn't the target's shape: method ot averages with it unit by unit",
            where="anchor",
            got=shape,
            allowed=wanted,
            hint="train a model of the target's shape, or ask for the anchor's shape",
        )
    for parent in parents:
        depth = family.shape(parent.model.config).num_hidden_layers
        if depth != shape.num_hidden_layers:
            raise ParentError(
                "the parent isn't as deep as the anchor: method ot moves layer to layer",
                where=parent.name,
                got=f"{depth} layers",
                allowed=f"{shape.num_hidden_layers} layers",
                hint="method refit fuses models of other depths",
            )
    configs: dict[str, Any] = {p.name: p.model.config for p in parents}
    base: Any = anchor.config
    lines = family.mismatches({"anchor": base, **configs})
    lines += [
        f"labels: anchor has {_labels(base.id2label)}, {name} has {_labels(config.id2label)}"
        for name, config in configs.items()
        if family.layout(base).head and config.id2label != base.id2label
    ]
    if lines:
        raise ParentError(
            "the parents don't fit the anchor",
            where="parents",
            got="; ".join(lines),
            hint="method ot averages unit by unit, classes too; method refit takes other labels",
        )


def _labels(labels: Mapping[int, str]) -> str:
    names = list(labels.values())
    return f"{len(names)} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
