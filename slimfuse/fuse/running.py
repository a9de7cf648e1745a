"""Parents and target, block after block over cached batches: only streams are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs
from slimfuse.families import Block, Layout
from slimfuse.fuse import walk
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.fits import Draw, Groups, Weighing, sequences
from slimfuse.fuse.union import Member, Union

JUDGES = 64  # sequences that judge a ridge: the order of strengths is what matters …
ENOUGH = 4096  # … or as many as have so many tokens, but not fewer than …
FEWEST = 32
Rows = Callable[[int, Tensor], Tensor]
"""Batch number and places (r,) -> float64 rows (r, width)."""


class Running:
    """The streams of all parents (x0, x1, …) and of the target (z), one batch in memory at a time.

    Within a block also what member k reads: i{k} before its attention, m{k} before its MLP. Of
    post-norm parents also what the last norm divided by: s0, s1, …; in a sandwich d{k}, see
    `divisor`.
    """

    def __init__(
        self, union: Union, target: nn.Module, layout: Layout, cache: StreamCache, draw: Draw
    ) -> None:
        self.union, self.target, self.layout = union, target, layout
        self.cache, self.draw, self.ranks = cache, draw, draw.ranks
        self.sizes: list[int] = []  # samples of every batch
        self.masks: list[Tensor | None] = []  # their real tokens, see `walk.Start`
        self.calls: list[list[tuple[walk.Call, ...]]] = []  # of every batch, each parent's blocks
        self.own_calls: list[tuple[walk.Call, ...]] = []  # of every batch, the target's blocks
        self.tokens = 0
        self.left = [layout.embed_norm for layout in union.layouts]
        """The norm that each parent's stream has left, of post-norm parents."""

    @cached_property
    def every(self) -> list[int]:
        """The samples of every batch, those of other processes, too."""
        numbered = [(self.draw.number(b), size) for b, size in enumerate(self.sizes)]
        return [size for _, size in sorted(self.ranks.gather(numbered))]

    def first(self, batch: int) -> int:
        """Return the number of a batch's first sample among all."""
        return sum(self.every[: self.draw.number(batch)])

    def start(self, batches: Iterable[Inputs]) -> None:
        """Start the streams from the embeddings."""
        for batch in batches:
            self.start_parents([batch])
            self.start_own([batch])

    def start_own(self, batches: Iterable[Inputs]) -> None:
        """Start the target's streams of the next batches."""
        for b, batch in enumerate(batches, start=len(self.own_calls)):
            begun = walk.start(self.target, self.layout, batch)
            self.cache.put("z", b, begun.stream)
            self.own_calls.append(begun.calls)

    def start_parents(self, batches: Iterable[Inputs]) -> None:
        """Start the parents' streams of the next batches."""
        for b, batch in enumerate(batches, start=len(self.sizes)):
            calls = []
            for p, (parent, layout) in enumerate(self.union.pairs):
                if layout.embed_norm:
                    begun, total = walk.start_sum(parent, layout, batch)
                    self._keep_scale(p, layout.embed_norm, total, b)
                else:
                    begun = walk.start(parent, layout, batch)
                self.cache.put(f"x{p}", b, begun.stream)
                calls.append(begun.calls)
            self.tokens = begun.stream.shape[1]
            self.sizes.append(len(batch))
            self.masks.append(begun.mask)
            self.calls.append(calls)
            self.draw.see(len(batch), begun.mask)
            self._tell(b)

    def start_sums(self, batches: Iterable[Inputs]) -> None:
        """Put what a post-norm target's first norm sees in the place of its stream."""
        for b, batch in enumerate(batches):
            begun, total = walk.start_sum(self.target, self.layout, batch)
            self.cache.put("z", b, total)
            self.own_calls.append(begun.calls)

    def streams(self, batch: int) -> list[Tensor]:
        """Return every parent's stream."""
        return [self.cache.get(f"x{p}", batch) for p in range(len(self.union))]

    def stream(self, batch: int) -> Tensor:
        """Return the target's stream."""
        return self.cache.get("z", batch)

    def scale(self, parent: int, batch: int) -> Tensor:
        """Return what a post-norm parent's last norm divided by (batch, tokens, 1)."""
        return self.cache.get(f"s{parent}", batch)

    def attend(self, members: Sequence[Member], batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Run the parents up to their last MLP of a block; x{p}: with all attention added.

        Returns the members' normed streams and their heads' outputs.
        """
        normed, outputs = [], []
        streams = self.streams(batch)
        goals = list(streams)
        for k, member in enumerate(members):
            x = streams[member.parent]
            normed.append(self.union.normed(member, "attention_norm", x))
            told = self.calls[batch][member.parent][member.layer]
            heads, total = self.union.attention(member, x, told)
            mid = self.union.landed(member, "attention_norm", total)
            outputs.append(self._divided(k, member, "o", heads, batch))
            self.cache.put(f"i{k}", batch, x)
            self.cache.put(f"m{k}", batch, mid)
            goals[member.parent] = goals[member.parent] + (total - x)
            if _last(members, k):
                total = goals[member.parent]
                self._note(member, "attention_norm", total, batch)
                goals[member.parent] = self.union.landed(member, "attention_norm", total)
            else:
                total = self.union.mlp(member, mid)[1]
                streams[member.parent] = self.union.landed(member, "mlp_norm", total)
        for p, x in enumerate(goals):
            self.cache.put(f"x{p}", batch, x)
        self._tell(batch)
        return normed, outputs

    def activate(self, members: Sequence[Member], batch: int) -> list[Tensor]:
        """Run the members' MLPs and return their activations."""
        activations = []
        sums = self.streams(batch)
        for k, member in enumerate(members):
            mid = self.cache.get(f"m{k}", batch)
            units, total = self.union.mlp(member, mid)
            activations.append(self._divided(k, member, "down", units, batch))
            sums[member.parent] = sums[member.parent] + (total - mid)
            if _last(members, k):
                self._note(member, "mlp_norm", sums[member.parent], batch)
                after = self.union.landed(member, "mlp_norm", total)
                self.cache.put(f"x{member.parent}", batch, after)
        self._tell(batch)
        return activations

    def normed(self, members: Sequence[Member], norm: str, batch: int) -> list[Tensor]:
        """Return what the members' readers see behind one of their norms."""
        name = "i" if norm == "attention_norm" else "m"
        return [
            self.union.normed(m, norm, self.cache.get(f"{name}{k}", batch))
            for k, m in enumerate(members)
        ]

    def own(self, norm: str, batch: int) -> Tensor:
        """Return what the target's branch with the norm at this path reads."""
        return walk.reading(self.target, self.layout.blocks[0], norm, self.stream(batch))

    def heads(self, index: int, batch: int) -> Tensor:
        """Return what the heads of the target's block make of its stream."""
        block, told = self.layout.blocks[index], self.own_calls[batch][index]
        return walk.attend(self.target, block, self.stream(batch), told)

    def top(self, batch: int) -> Tensor:
        """Return what the target's head reads (n, m)."""
        return walk.read_out(self.target, self.layout, self.stream(batch), self.masks[batch])

    def divisor(self, k: int, batch: int) -> Tensor:
        """Return what the norm of member k's last branch divided by (batch, tokens, 1)."""
        return self.cache.get(f"d{k}", batch)

    def advance(self, block: Block, part: str, batch: int, units: Tensor) -> None:
        """Add what a part (o or down) of the target's block makes of its units to the stream.

        A post-norm target's sum takes the stream's place until its norm is known (`post_norm`).
        """
        out = walk.written(self.target, block, part, units)
        self.cache.put("z", batch, self.stream(batch) + out)

    def forget(self, members: Sequence[Member], name: str) -> None:
        """Drop what the members read: `i` or `m`."""
        for b in range(len(self.sizes)):
            for k in range(len(members)):
                self.cache.drop(f"{name}{k}", b)

    def judges(
        self, checkpoint: int, width: int, inputs: Rows, goals: Rows, kind: Weighing = "stream"
    ) -> Groups:
        """Yield the rows of some sequences, spread over all batches, for leaving out."""
        count = min(JUDGES, max(FEWEST, ENOUGH // self.tokens))
        step = max(1, sum(self.every) // count)
        for b in range(len(self.sizes)):
            places, weights = self.draw(checkpoint, b, width, kind)
            judged = (places // self.tokens + self.first(b)) % step == 0
            if judged.any():
                places, weights = places[judged], weights[judged]
                rows = inputs(b, places), goals(b, places)
                yield from sequences(places, self.tokens, *rows, weights)

    def _tell(self, batch: int) -> None:
        """Tell the draw how large RMSNorm parents' streams are: the mean square of a channel."""
        if self.union.rms:
            sizes = [x.double().square().mean(-1) for x in self.streams(batch)]
            self.draw.tell(batch, torch.stack(sizes).mean(0))

    def _divided(self, k: int, member: Member, part: str, units: Tensor, batch: int) -> Tensor:
        """Return units divided as a norm behind their branch divides it, see `sandwich`."""
        block, model = self.union.block(member), self.union.parents[member.parent].model
        norm = block.post(part)
        if not norm:
            return units
        out = walk.apply(model, getattr(block, part), units)
        scale = walk.root_mean_square(model.get_submodule(norm), out)
        self.cache.put(f"d{k}", batch, scale)
        return units / scale

    def _note(self, member: Member, norm: str, total: Tensor, batch: int) -> None:
        """Keep what a post-norm member's norm divides the sum with all branches so far by."""
        if self.union.post_norm:
            path: str = getattr(self.union.block(member), norm)
            self._keep_scale(member.parent, path, total, batch)

    def _keep_scale(self, parent: int, norm: str, total: Tensor, batch: int) -> None:
        module = self.union.parents[parent].model.get_submodule(norm)
        self.cache.put(f"s{parent}", batch, walk.norm_scale(module, total))
        self.left[parent] = norm


def _last(members: Sequence[Member], k: int) -> bool:
    return k + 1 == len(members) or members[k + 1].parent != members[k].parent
