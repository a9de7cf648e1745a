"""Sequential least-squares refit (fusion.md §5): build the target layer by layer in closed form.

Several parents are treated as one wide network. Its stream is their consensus y = Σ_p K_p x_p,
its heads and MLP units are all the parents' own, each writing K_p W to y. A target block stands
for a run of each parent's blocks (see `depth`). The target keeps the units that explain the rest
best, and every layer is then solved against what the already-built part of the target really
produces. Rows are weighted by what they matter to the parents' logits (see `importance`): after
the last attention only the readout token does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches
from slimfuse.families import Family
from slimfuse.fuse.builder import Builder, Part
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.choice import Heads, Units, check_heads
from slimfuse.fuse.depth import Segments
from slimfuse.fuse.fits import ONE, Draw, Ridge
from slimfuse.fuse.labels import Goals, MeanLogits
from slimfuse.fuse.memory import hold_steady
from slimfuse.fuse.narrowing import narrowing, unite
from slimfuse.fuse.random_features import RandomFeatures
from slimfuse.fuse.scoring import Saliency
from slimfuse.fuse.stream import EXACT, Consensus, StreamMap, StreamMethod
from slimfuse.fuse.union import Parent
from slimfuse.progress import track
from slimfuse.saliency.parallel import Processes
from slimfuse.saliency.sparsify_state import check_alike
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

    @property
    def mixes(self) -> list[Tensor]:
        """E_p (m, d_p) of every parent: the target's stream is Σ_p E_p x_p."""
        return [self.stream.encode @ mix for mix in self.consensus.mixes]


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
    ranks: Processes = ONE,
) -> Fusion:
    """Write the fused weights into `target` and return what was done.

    parents: models of one family, any widths and depths; the first is the anchor. batches: gives
    the same unlabelled inputs (batch, …) each time it is called. goals: what the head shall
    give, from the parents' logits (default: their weighted mean); none where there is no head.
    random_features: the control that keeps the target's own embeddings, queries, keys, values and
    MLP inputs as they were initialised and fits only what writes to the stream, and the head.
    scratch: folder for streams that don't fit into memory. Moments are float64, forward passes
    run in the models' own dtype. ranks: processes that are given the same and share the batches in
    turn; all get the same weights. Source: fusion.md §3-5.
    """
    own = family.layout(target.config)
    ranks = ranks if ranks.of <= n_batches else ONE  # else one would have none
    if goals is None and own.head:
        head = target.get_parameter(f"{own.head}.weight")
        goals = MeanLogits([p.weight for p in parents], len(head))
    hold_steady()
    with torch.no_grad(), StreamCache(folder=scratch) as cache:
        union, rows = unite(parents, target.config, family, batches, settings)
        check_heads(union, family.atlas(target.config), own, settings.heads)
        found = narrowing(union, rows, target.config, family, batches, settings,
                          n_batches=n_batches, ranks=ranks)  # fmt: skip
        kind = RandomFeatures if random_features else Builder
        builder = kind(
            union, target, family, cache, settings, Draw(found.importance, rows, ranks),
            mixes=found.mixes, readbacks=found.readbacks,
        )  # fmt: skip
        builder.embed(ranks.share(batches)())
        build_blocks(builder, len(own.blocks))
        builder.head(goals)
    if ranks.of > 1:
        check_alike(target.state_dict().values(), ranks.sum)
    narrow = found.stream
    if builder.rotation is not None:
        turn = builder.rotation
        narrow = replace(narrow, encode=turn.T @ narrow.encode, decode=narrow.decode @ turn)
    return Fusion(
        found.consensus, narrow, tuple(builder.parts), tuple(builder.stream_errors), union.segments
    )


def build_blocks(builder: Builder, depth: int) -> None:
    """Build all blocks, in order."""
    with track("fusing layers", 2 * depth) as tell:
        for block in range(depth):
            builder.attention(block)
            tell(2 * block + 1)
            builder.mlp(block)
            tell(2 * block + 2)
