"""Sequential least-squares refit (fusion.md §5): build the target layer by layer in closed form.

Several parents are treated as one wide network. Its stream is their consensus y = Σ_p K_p x_p,
its heads and MLP units are all the parents' own, each writing K_p W to y. A target block stands
for a run of each parent's blocks (see `depth`). The target keeps the units that explain the rest
best, and every layer is then solved against what the already-built part of the target really
produces. Rows are weighted by what they matter to the parents' logits (see `importance`): after
the last attention only the readout token does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches, Inputs, token_mask
from slimfuse.errors import ParentError
from slimfuse.families import Family, Layout
from slimfuse.fuse import walk
from slimfuse.fuse.builder import Builder, Part
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.choice import Heads, Units, check_heads
from slimfuse.fuse.depth import Segments, match_depths
from slimfuse.fuse.fits import Draw, Ridge
from slimfuse.fuse.importance import TOKENS, gradients, token_weights
from slimfuse.fuse.labels import Goals, MeanLogits
from slimfuse.fuse.memory import hold_steady
from slimfuse.fuse.random_features import RandomFeatures
from slimfuse.fuse.sandwich import upright
from slimfuse.fuse.scoring import Saliency, by_gradients, saliencies
from slimfuse.fuse.stream import EXACT, Consensus, StreamMap, StreamMethod, consensus, stream_map
from slimfuse.fuse.union import Parent, Union
from slimfuse.progress import track
from slimfuse.transport import Solver

__all__ = ["Batches", "Fusion", "Parent", "Part", "Settings", "refit"]


@dataclass(frozen=True)
class Settings:
    """How the stream is narrowed, which units stay, how hard the fits hold on to their priors.

    ridge: relative to the mean diagonal; None: by leave-one-sequence-out. layers: the deepest
    parent's blocks that each target block stands for; None: by similarity. solver: of the plans
    that `stream: ot` and `units: ot` ask for. saliency: what a unit counts where units are chosen
    by it, or merged by plans; see `scoring`. seed: of its random numbers, where it has any.
    """

    stream: StreamMethod = "pca"
    units: Units = "cholesky"
    saliency: Saliency = "energy"
    heads: Heads = "drop"
    ridge: Ridge = None
    solver: Solver = EXACT
    layers: tuple[tuple[int, ...], ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Fusion:
    """What a refit did: the stream's consensus and map, every fitted part, the stream's error.

    The map holds the turn that a tied head asked for (see `vocabulary`).
    """

    consensus: Consensus
    stream: StreamMap
    parts: tuple[Part, ...]
    stream_errors: tuple[float, ...]
    segments: tuple[Segments, ...]


def refit(
    parents: Sequence[Parent],
    target: nn.Module,
    family: Family,
    batches: Batches,
    settings: Settings,
    *,
    n_batches: int,
    goals: Goals | None = None,
    random_features: bool = False,
    scratch: Path | None = None,
) -> Fusion:
    """Write the fused weights into `target` and return what was done.

    parents: models of one family, any widths and depths; the first is the anchor. batches: gives
    the same unlabelled inputs (batch, …) each time it is called. goals: what the head shall
    give, from the parents' logits (default: their weighted mean); none where there is no head.
    random_features: the control that keeps the target's own embeddings, queries, keys, values and
    MLP inputs as they were initialised and fits only what writes to the stream, and the head.
    scratch: folder for streams that don't fit into memory. Moments are float64, forward passes
    run in the models' own dtype. Source: fusion.md §3-5.
    """
    own = family.layout(target.config)
    if goals is None and own.head:
        head = target.get_parameter(f"{own.head}.weight")
        goals = MeanLogits([p.weight for p in parents], len(head))
    layouts = [family.layout(p.model.config) for p in parents]
    depth = len(own.blocks)
    hold_steady()
    with torch.no_grad(), StreamCache(folder=scratch) as cache:
        segments = match_depths([p.model for p in parents], layouts, depth, batches,
                                settings.layers)  # fmt: skip
        weights = [p.weight for p in parents]
        rows = count_rows(parents[0].model, layouts[0], batches())
        scored = None
        if settings.units in ("saliency", "ot", "cluster") and by_gradients(settings.saliency):
            scored = saliencies([p.model for p in parents], family, batches, settings.saliency,
                                weights, rows=rows, seed=settings.seed)  # fmt: skip
        union = Union(parents, family, segments, scored)
        check_heads(union, family.atlas(target.config), own, settings.heads)
        by_gradient = settings.stream == "gradient-pca"
        found = [
            gradients(p.model, layouts[i], batches(), union.checkpoints(i), TOKENS / rows,
                      directions=by_gradient)
            for i, p in enumerate(parents)
        ]  # fmt: skip
        importance = token_weights(found, weights)
        joint = union.joint_stream(batches(), importance, rows, n_batches)
        _check_alive(parents, joint, union.widths)
        centred = not (union.post_norm or union.rms)
        common = consensus(joint, union.widths, weights, centred=centred)
        width = family.shape(target.config).hidden_size
        metric = None
        if by_gradient:  # x_p ≈ B_p y, so gradients come back by B_pᵀ
            directions = [g.directions for g in found if g.directions is not None]
            backs = zip(weights, directions, common.readbacks, strict=True)
            metric = torch.stack([w * back.T @ g @ back for w, g, back in backs]).sum(0)
        narrow = stream_map(
            common.second, width, settings.stream, solver=settings.solver, metric=metric,
            norm=own.norm,
        )  # fmt: skip
        if own.blocks[0].attention_post:
            narrow = upright(narrow)
        kind = RandomFeatures if random_features else Builder
        builder = kind(
            union, target, family, cache, settings, Draw(importance, rows),
            mixes=[narrow.encode @ mix for mix in common.mixes],
            readbacks=[back @ narrow.decode for back in common.readbacks],
        )  # fmt: skip
        builder.embed(batches())
        build_blocks(builder, depth)
        builder.head(goals)
    if builder.rotation is not None:
        turn = builder.rotation
        narrow = replace(narrow, encode=turn.T @ narrow.encode, decode=narrow.decode @ turn)
    return Fusion(
        common, narrow, tuple(builder.parts), tuple(builder.stream_errors), union.segments
    )


def _check_alive(parents: Sequence[Parent], joint: Tensor, widths: Sequence[int]) -> None:
    """Raise ParentError for a parent whose stream is the same everywhere, or not finite."""
    energies = [float(part.sum()) for part in joint.diagonal().split(list(widths))]
    for parent, energy in zip(parents, energies, strict=True):
        if not 0 < energy < float("inf"):
            raise ParentError(
                "the parent's activations are nought or not finite",
                where=f"parents.{parent.name}",
                hint="check that it is trained and whole: it has nothing to give",
            )


def build_blocks(builder: Builder, depth: int) -> None:
    """Build all blocks, in order."""
    with track("fusing layers", 2 * depth) as tell:
        for block in range(depth):
            builder.attention(block)
            tell(2 * block + 1)
            builder.mlp(block)
            tell(2 * block + 2)


def count_rows(parent: nn.Module, layout: Layout, batches: Iterable[Inputs]) -> int:
    """Return how many real tokens all batches have at one depth."""
    count, tokens = 0, 0
    for batch in batches:
        mask = token_mask(batch)
        tokens = tokens or walk.start(parent, layout, batch[:1]).stream.shape[1]
        count += len(batch) * tokens if mask is None else int(mask.sum())
    return count
