"""The parents seen as one wide network: all their heads and units write to one stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.families import Family, Layout
from slimfuse.fuse import walk
from slimfuse.fuse.stream import centring
from slimfuse.moments import Moments
from slimfuse.progress import track
from slimfuse.spaces import Atlas


@dataclass(frozen=True)
class Parent:
    """A trained model with its share of the fusion."""

    name: str
    model: nn.Module
    weight: float = 1.0


class Union:
    """What a refit asks of its parents; `p` is a parent's place, streams come one a parent."""

    def __init__(self, parents: Sequence[Parent], family: Family) -> None:
        configs: list[Any] = [p.model.config for p in parents]
        self.parents = tuple(parents)
        self.layouts: list[Layout] = [family.layout(c) for c in configs]
        self.atlases: list[Atlas] = [family.atlas(c) for c in configs]
        self.states: list[dict[str, Tensor]] = [dict(p.model.state_dict()) for p in parents]
        self.head_dims = [family.head_dims(c) for c in configs]
        self.widths = [family.shape(c).hidden_size for c in configs]

    def __len__(self) -> int:
        return len(self.parents)

    def weight(self, p: int, layer: int, part: str) -> Tensor:
        """Return a parent's float64 weight of one part of a block."""
        name: str = getattr(self.layouts[p].blocks[layer], part)
        return self.states[p][f"{name}.weight"].double()

    def outputs(self, mixes: Sequence[Tensor], layer: int, part: str) -> Tensor:
        """Return what all units write to the target's stream (m, Σ n_p)."""
        return torch.cat([m @ self.weight(p, layer, part) for p, m in enumerate(mixes)], dim=1)

    def units(self, layer: int, part: str) -> list[int]:
        """Return how many units each parent has in a part."""
        return [len(self.weight(p, layer, part)) for p in range(len(self))]

    def joint_stream(self, batches: Iterable[Tensor], importance: Tensor, count: int) -> Tensor:
        """Return E[w x xᵀ / |P x_1|²] (Σd, Σd) of the joint streams over all depths and tokens.

        importance: w (depths, tokens); count: how many batches there are, for the progress bar.
        """
        moments = Moments(joint=sum(self.widths))
        project = centring(self.widths[0])
        pairs = list(zip(self.parents, self.layouts, strict=True))
        with track("reading the parents' streams", count) as tell:
            for i, batch in enumerate(batches):
                runs = [walk.streams(p.model, layout, batch) for p, layout in pairs]
                for depth, parallel in enumerate(zip(*runs, strict=True)):
                    joint = torch.cat([walk.rows(x) for x in parallel], dim=1)
                    norm = (joint[:, : self.widths[0]] @ project).square().sum(1)
                    weights = importance[depth].repeat(len(batch)) / norm.clamp_min(1e-12)
                    moments.update(weights, joint=joint)
                tell(i + 1)
        return moments.second("joint")

    def embed(self, batch: Tensor) -> list[Tensor]:
        """Return the first streams of a batch of inputs."""
        return [
            walk.embed(p.model, layout, batch)
            for p, layout in zip(self.parents, self.layouts, strict=True)
        ]

    def normed(self, norm: str, streams: Sequence[Tensor]) -> list[Tensor]:
        """Return the streams after the norm of this name."""
        return [walk.apply(p.model, norm, x) for p, x in zip(self.parents, streams, strict=True)]

    def attention(
        self, layer: int, streams: Sequence[Tensor], normed: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the heads' outputs and the streams after attention."""
        contexts, after = [], []
        for p, layout, x, y in zip(self.parents, self.layouts, streams, normed, strict=True):
            block = layout.blocks[layer]
            contexts.append(walk.attend(p.model, block, y))
            after.append(x + walk.apply(p.model, block.o, contexts[-1]))
        return contexts, after

    def mlp(self, layer: int, streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the MLPs' activations and the streams after them."""
        units, after = [], []
        for p, layout, x in zip(self.parents, self.layouts, streams, strict=True):
            hidden, out = walk.mlp(p.model, layout.blocks[layer], x)
            units.append(hidden)
            after.append(x + out)
        return units, after

    def head_scores(
        self, p: int, layer: int, query: Moments, key: Moments
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the second moment of q and the covariance of k for every head of a parent.

        query, key: moments of the normed stream, site "x", weighted for each. Keys enter centred,
        because what is constant over keys leaves the softmax as it was.
        """
        dims = self.head_dims[p]
        q, k = self.weight(p, layer, "q"), self.weight(p, layer, "k")
        bias = self.states[p].get(f"{self.layouts[p].blocks[layer].q}.bias")
        mean = q @ query.mean("x") + (0.0 if bias is None else bias.double())
        queries = q @ query.cov("x") @ q.T + torch.outer(mean, mean)
        keys = k @ key.cov("x") @ k.T
        cuts = [slice(h, h + dims) for h in range(0, len(q), dims)]
        return [(queries[c, c], keys[c, c]) for c in cuts]
