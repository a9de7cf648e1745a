"""From the parents' streams to the target's: which depths face each other, and the one map.

A refit builds on it, and so does teaching a child its parents' hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches, Inputs, token_mask
from slimfuse.errors import ParentError
from slimfuse.families import Family, Layout
from slimfuse.fuse import walk
from slimfuse.fuse.choice import Units
from slimfuse.fuse.depth import match_depths
from slimfuse.fuse.fits import ONE
from slimfuse.fuse.importance import TOKENS, gradients, token_weights
from slimfuse.fuse.sandwich import upright
from slimfuse.fuse.scoring import Saliency, by_gradients, saliencies
from slimfuse.fuse.stream import Consensus, StreamMap, StreamMethod, consensus, stream_map
from slimfuse.fuse.union import Parent, Union
from slimfuse.saliency.parallel import Processes
from slimfuse.transport import Solver


class Narrow(Protocol):
    """The settings that decide the map; as in `refit.Settings`."""

    @property
    def stream(self) -> StreamMethod:
        """How the stream is narrowed."""

    @property
    def units(self) -> Units:
        """How units are chosen."""

    @property
    def saliency(self) -> Saliency:
        """What a unit counts."""

    @property
    def solver(self) -> Solver:
        """Of the plans."""

    @property
    def layers(self) -> tuple[tuple[int, ...], ...] | None:
        """The deepest parent's blocks that each target block stands for."""

    @property
    def seed(self) -> int:
        """Of random numbers."""


@dataclass(frozen=True)
class Narrowing:
    """The parents as one wide network, and the map of its stream onto the target's.

    importance: (depths, tokens), what rows count for; rows: real tokens of all batches at a depth.
    """

    union: Union
    consensus: Consensus
    stream: StreamMap
    importance: Tensor
    rows: int

    @property
    def mixes(self) -> list[Tensor]:
        """E_p (m, d_p) of every parent: the target's stream is Σ_p E_p x_p."""
        return [self.stream.encode @ mix for mix in self.consensus.mixes]

    @property
    def readbacks(self) -> list[Tensor]:
        """(d_p, m) of every parent: x_p ≈ R_p z."""
        return [back @ self.stream.decode for back in self.consensus.readbacks]


def unite(
    parents: Sequence[Parent], target: Any, family: Family, batches: Batches, settings: Narrow
) -> tuple[Union, int]:
    """Return the parents as one network for a target with this config, and the rows of a depth.

    Call it without gradients. Raises ShapeError for depths that don't fit.
    """
    layouts = [family.layout(p.model.config) for p in parents]
    depth = len(family.layout(target).blocks)
    segments = match_depths([p.model for p in parents], layouts, depth, batches, settings.layers)
    rows = count_rows(parents[0].model, layouts[0], batches())
    scored = None
    if settings.units in ("saliency", "ot", "cluster") and by_gradients(settings.saliency):
        scored = saliencies([p.model for p in parents], family, batches, settings.saliency,
                            [p.weight for p in parents], rows=rows, seed=settings.seed)  # fmt: skip
    return Union(parents, family, segments, scored), rows


def narrowing(
    union: Union,
    rows: int,
    target: Any,
    family: Family,
    batches: Batches,
    settings: Narrow,
    *,
    n_batches: int,
    ranks: Processes = ONE,
) -> Narrowing:
    """Return the map of the parents' streams onto that of a target with this config (§3).

    union, rows: of `unite`. Call it without gradients. Raises ParentError for a parent whose
    stream is dead. ranks: processes that share the batches where sums are made of them.
    """
    own, parents, layouts = family.layout(target), union.parents, union.layouts
    weights = [p.weight for p in parents]
    by_gradient = settings.stream == "gradient-pca"
    found = [
        gradients(p.model, layouts[i], batches(), union.checkpoints(i), TOKENS / rows,
                  directions=by_gradient)
        for i, p in enumerate(parents)
    ]  # fmt: skip
    importance = token_weights(found, weights)
    joint = union.joint_stream(batches(), importance, rows, n_batches, ranks)
    _check_alive(parents, joint, union.widths)
    centred = not (union.post_norm or union.rms)
    common = consensus(joint, union.widths, weights, centred=centred)
    metric = None
    if by_gradient:  # x_p ≈ B_p y, so gradients come back by B_pᵀ
        directions = [g.directions for g in found if g.directions is not None]
        backs = zip(weights, directions, common.readbacks, strict=True)
        metric = torch.stack([w * back.T @ g @ back for w, g, back in backs]).sum(0)
    narrow = stream_map(
        common.second, family.shape(target).hidden_size, settings.stream, solver=settings.solver,
        metric=metric, norm=own.norm,
    )  # fmt: skip
    if own.blocks[0].attention_post:
        narrow = upright(narrow)
    return Narrowing(union, common, narrow, importance, rows)


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


def count_rows(parent: nn.Module, layout: Layout, batches: Iterable[Inputs]) -> int:
    """Return how many real tokens all batches have at one depth."""
    count, tokens = 0, 0
    for batch in batches:
        mask = token_mask(batch)
        tokens = tokens or walk.start(parent, layout, batch[:1]).stream.shape[1]
        count += len(batch) * tokens if mask is None else int(mask.sum())
    return count
