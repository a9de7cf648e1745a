"""The parents seen as one wide network: all their heads and units write to one stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs, token_mask
from slimfuse.families import Block, Family, Layout
from slimfuse.fuse import walk
from slimfuse.fuse.depth import Segments
from slimfuse.fuse.fits import ONE
from slimfuse.fuse.importance import drawn
from slimfuse.moments import Moments, precision
from slimfuse.progress import track
from slimfuse.saliency.gradients import Share
from slimfuse.saliency.parallel import Processes
from slimfuse.spaces import Atlas

JOINT_ROWS = 8  # rows a depth of the joint stream's moments, in multiples of its width …
LEAST_ROWS = 16_384  # … but this many where there are


@dataclass(frozen=True)
class Parent:
    """A trained model with its share of the fusion."""

    name: str
    model: nn.Module
    weight: float = 1.0


@dataclass(frozen=True)
class Member:
    """A block of a parent (by its place among the parents) that a target block stands for."""

    parent: int
    layer: int


class Union:
    """What a refit asks of its parents; streams come one a parent, `segments` as in `depth`."""

    def __init__(
        self,
        parents: Sequence[Parent],
        family: Family,
        segments: Sequence[Segments],
        saliency: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Take the parents; saliency: scores of each one's units, where some are known."""
        configs: list[Any] = [p.model.config for p in parents]
        self.saliency = saliency or [{} for _ in parents]
        self.parents, self.segments = tuple(parents), tuple(segments)
        self.layouts: list[Layout] = [family.layout(c) for c in configs]
        self.atlases: list[Atlas] = [family.atlas(c) for c in configs]
        self.states: list[dict[str, Tensor]] = [dict(p.model.state_dict()) for p in parents]
        self.head_dims = [family.head_dims(c) for c in configs]
        self.widths = [family.shape(c).hidden_size for c in configs]

    @property
    def post_norm(self) -> bool:
        """Whether the parents' norms stand behind the additions."""
        return self.layouts[0].norm_order == "post"

    @property
    def rms(self) -> bool:
        """Whether the parents' norms keep the mean over channels."""
        return self.layouts[0].norm == "rms"

    @property
    def whole_heads(self) -> bool:
        """Whether the axis of queries and keys is fixed (rotary positions): heads stay whole."""
        space = self.layouts[0].blocks[0].qk_space
        return self.atlases[0].spaces[space].kind == "fixed"

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def pairs(self) -> list[tuple[nn.Module, Layout]]:
        """Every parent's model with its layout."""
        return [(p.model, layout) for p, layout in zip(self.parents, self.layouts, strict=True)]

    def members(self, block: int) -> list[Member]:
        """Return the parents' blocks that a target block stands for."""
        return [Member(p, i) for p, parts in enumerate(self.segments) for i in parts[block]]

    def checkpoints(self, parent: int) -> list[int]:
        """Return the parent's depths that face the target's: first, then middle and end of each.

        A depth counts the additions to the stream: 2·layer before a block, 2·layer + 1 within.
        """
        depths = [0]
        for segment in self.segments[parent]:
            end = 2 * segment.stop
            depths += [end - 1 if len(segment) else depths[-1], end if len(segment) else depths[-1]]
        return depths

    def block(self, member: Member) -> Block:
        """Return where a member keeps its parts."""
        return self.layouts[member.parent].blocks[member.layer]

    def weight(self, member: Member, part: str) -> Tensor:
        """Return a member's float64 weight of one part."""
        name: str = getattr(self.block(member), part)
        return self.states[member.parent][f"{name}.weight"].double()

    def outputs(self, mixes: Sequence[Tensor], members: Sequence[Member], part: str) -> Tensor:
        """Return what all units of the members write to the target's stream (m, Σ n).

        In a sandwich units count as divided by what the branch's norm divides by, see `Sandwich`.
        """
        return torch.cat(
            [mixes[m.parent] * self.post_gain(m, part) @ self.weight(m, part) for m in members],
            dim=1,
        )

    def scores(self, members: Sequence[Member], part: str) -> Tensor | None:
        """Return the saliency of the members' heads (part o) or units (down), None if not known."""
        found = []
        for member in members:
            block = self.block(member)
            space = block.head_space if part == "o" else block.mlp_space
            found.append(self.saliency[member.parent].get(space))
        known = [scores for scores in found if scores is not None]
        return torch.cat(known) if known and len(known) == len(found) else None

    def units(self, members: Sequence[Member], part: str) -> list[int]:
        """Return how many units each member has in a part."""
        return [len(self.weight(m, part)) for m in members]

    def joint_stream(
        self,
        batches: Iterable[Inputs],
        importance: Tensor,
        rows: int,
        count: int,
        ranks: Processes = ONE,
    ) -> Tensor:
        """Return E[w x xᵀ / |P x_1|²] (Σd, Σd) of the joint streams over all depths and tokens.

        P removes the mean over channels, and is I under RMSNorm. Post-norm streams, which are read
        as they are, enter about their mean at each depth, and with their norm's shift in the place
        of the mean over channels.
        importance: w (checkpoints, tokens); rows: how many there are a depth, of which a seeded
        draw is used where they are many; count: how many batches there are; ranks: processes that
        share them.
        """
        width = sum(self.widths)
        dtype = next(self.parents[0].model.parameters()).dtype
        reduce = ranks.sum if ranks.of > 1 else None
        moments = Moments(precision(width, dtype), reduce, joint=width)
        share = min(1.0, max(JOINT_ROWS * width, LEAST_ROWS) / rows)
        means = [(torch.zeros(width, dtype=torch.float64), 0.0)] * len(importance)
        with track("reading the parents' streams", count) as tell:
            for i, batch in Share(drawn(batches, share), ranks.index, ranks.of).numbered():
                runs = [self._streams(p, batch) for p in range(len(self))]
                mask = token_mask(batch)
                real = None if mask is None else mask.flatten().nonzero()[:, 0]
                for place, parallel in enumerate(zip(*runs, strict=True)):
                    joint = torch.cat([walk.rows(x, real) for x in parallel], dim=1)
                    first = joint[:, : self.widths[0]]
                    norm = (first - self._origin(place, first)).square().sum(1)
                    weights = importance[place].repeat(len(batch))
                    weights = walk.flat(weights[:, None], real)[:, 0] / norm.clamp_min(1e-12)
                    moments.update(weights, joint=joint)
                    total, mass = means[place]
                    means[place] = (total + weights @ joint, mass + float(weights.sum()))
                tell(i + 1)
        second = moments.second("joint")
        if self.post_norm:
            for total, mass in means:
                total = ranks.sum(total)
                mass = float(ranks.sum(torch.tensor(mass, dtype=torch.float64)))
                second -= torch.outer(total, total) / (mass * moments.weight)
        return second

    def _origin(self, place: int, stream: Tensor) -> Tensor:
        """Return what the norms leave out of the first parent's stream (r, d) at a checkpoint.

        Its mean over channels; in a post-norm model the shift of the norm that it has left.
        """
        if self.rms:
            return torch.zeros((), dtype=stream.dtype)
        if not self.post_norm:
            return stream.mean(1, keepdim=True)
        layout = self.layouts[0]
        left = layout.norm_at(self.checkpoints(0)[place]) or layout.projection
        return self.states[0][f"{left}.bias"].double()

    def _streams(self, parent: int, batch: Inputs) -> Iterator[Tensor]:
        """Yield a parent's streams at its checkpoints."""
        run = enumerate(walk.streams(self.parents[parent].model, self.layouts[parent], batch))
        depth, stream = next(run)
        for wanted in self.checkpoints(parent):
            while depth < wanted:
                depth, stream = next(run)
            yield stream

    def normed(self, member: Member, norm: str, stream: Tensor) -> Tensor:
        """Return what the member reads of a stream: behind one of its norms if they are before."""
        block = self.block(member)
        model = self.parents[member.parent].model
        return walk.reading(model, block, getattr(block, norm), stream)

    def gain(self, member: Member, norm: str) -> Tensor:
        """Return the gain (d_p,) between the stream and what the member reads of it."""
        if self.post_norm:
            return torch.ones(self.widths[member.parent], dtype=torch.float64)
        name: str = getattr(self.block(member), norm)
        return self.states[member.parent][f"{name}.weight"]

    def post_gain(self, member: Member, part: str) -> Tensor:
        """Return the gain (d_p,) of what a part (o or down) writes, ones without a norm of it."""
        norm = self.block(member).post(part)
        if not norm:
            return torch.ones(self.widths[member.parent], dtype=torch.float64)
        return self.states[member.parent][f"{norm}.weight"].double()

    def landed(self, member: Member, norm: str, total: Tensor) -> Tensor:
        """Return the stream that the sum with one of the member's branches becomes."""
        block = self.block(member)
        model = self.parents[member.parent].model
        return walk.landed(model, block, getattr(block, norm), total)

    def attention(self, member: Member, stream: Tensor, told: walk.Call) -> tuple[Tensor, Tensor]:
        """Return the heads' outputs and the sum of the stream and the branch."""
        model, block = self.parents[member.parent].model, self.block(member)
        heads = walk.attend(model, block, stream, told)
        return heads, stream + walk.written(model, block, "o", heads)

    def mlp(self, member: Member, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return the MLP's activations and the sum of the stream and the branch."""
        units, out = walk.mlp(self.parents[member.parent].model, self.block(member), stream)
        return units, stream + out

    def head_scores(
        self, members: Sequence[Member], query: Moments, key: Moments
    ) -> tuple[Tensor, Tensor]:
        """Return the second moment of q and the covariance of k of all heads (Σ n, Σ n).

        query, key: moments of the members' normed streams (sites n0, n1, …), weighted for each.
        Keys enter centred, because what is constant over keys leaves the softmax as it was.
        """
        q = [self.weight(m, "q") for m in members]
        k = [self.weight(m, "k") for m in members]
        means = []
        for i, member in enumerate(members):
            bias = self.states[member.parent].get(f"{self.block(member).q}.bias")
            means.append(q[i] @ query.mean(f"n{i}") + (0.0 if bias is None else bias.double()))

        def joint(weights: list[Tensor], moments: Moments) -> Tensor:
            return torch.cat(
                [
                    torch.cat(
                        [a @ moments.cov(f"n{i}", f"n{j}") @ b.T for j, b in enumerate(weights)],
                        dim=1,
                    )
                    for i, a in enumerate(weights)
                ]
            )

        mean = torch.cat(means)
        return joint(q, query) + torch.outer(mean, mean), joint(k, key)
