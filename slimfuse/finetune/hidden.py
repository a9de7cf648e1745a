"""Hidden states of the parents as goals for the child's, through the maps that fused them.

The child's stream behind its block l is taught z_l = Σ_p E_p x_p (tokens, m): what the parents'
streams x_p (tokens, d_p) are in the child's coordinates, E_p (m, d_p) as in fusion.md §3. Where
others learn a projection (Romero et al. 2015, arXiv 1412.6550; Jiao et al. 2020, arXiv 1909.10351)
a fused child's streams have these coordinates from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

TINY = torch.finfo(torch.float32).tiny


@contextmanager
def observing(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[int, Tensor]]:
    """Yield the streams (batch, tokens, d) of the latest pass: n is what n blocks have left.

    blocks: the paths of the model's blocks, in order, none to observe nothing; 0 is what the first
    one is given.
    """
    seen: dict[int, Tensor] = {}
    if not blocks:
        yield seen
        return

    def first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen[0] = given[0] if isinstance(given, tuple) else given

    def behind(place: int) -> Any:
        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            seen[place] = output[0] if isinstance(output, tuple) else output

        return keep

    modules = [model.get_submodule(path) for path in blocks]
    handles = [modules[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [m.register_forward_hook(behind(i)) for i, m in enumerate(modules, start=1)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Source:
    """A parent whose streams are taught.

    blocks: paths of its blocks; mix: E_p (m, d_p); depths: for every block of the child, how many
    of the parent's blocks have passed behind what it stands for.
    """

    name: str
    blocks: tuple[str, ...]
    mix: Tensor
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Hidden:
    """What the child's streams shall be, and how far they are from it.

    blocks: paths of the child's blocks; sources: the parents; weight: of this term beside the
    others; centred: whether a mean over channels doesn't count, as before a LayerNorm; turn: R
    (m, m), the child's coordinates of what the maps give, None where they are those.
    """

    blocks: tuple[str, ...]
    sources: tuple[Source, ...]
    weight: float
    centred: bool
    turn: Tensor | None = None

    def goals(self, seen: Sequence[dict[int, Tensor]]) -> tuple[Tensor, ...]:
        """Return Σ_p E_p x_p behind every block (batch, tokens, m), not turned yet.

        seen: what was observed of each source.
        """
        device, found = seen[0][0].device, []
        mixes = [source.mix.to(device, torch.float32) for source in self.sources]
        with torch.autocast(device.type, enabled=False):
            for block in range(len(self.blocks)):
                parts = [
                    streams[source.depths[block]].float() @ mix.T
                    for source, streams, mix in zip(self.sources, seen, mixes, strict=True)
                ]
                found.append(torch.stack(parts).sum(0))
        return tuple(found)

    def distance(
        self, own: dict[int, Tensor], goals: Sequence[Tensor], mask: Tensor | None
    ) -> Tensor:
        """Return the mean over blocks of Σ‖z - R goal‖² / Σ‖goal‖², sums over the real tokens."""
        with torch.autocast(goals[0].device.type, enabled=False):
            return self._distance(own, goals, mask)

    def _distance(
        self, own: dict[int, Tensor], goals: Sequence[Tensor], mask: Tensor | None
    ) -> Tensor:
        total = torch.zeros((), device=goals[0].device)
        turn = None if self.turn is None else self.turn.to(goals[0].device, torch.float32)
        for block, goal in enumerate(goals, start=1):
            mine, aim = own[block].float(), goal.float()
            if self.centred:  # before the turn, which was fitted so
                mine, aim = (x - x.mean(-1, keepdim=True) for x in (mine, aim))
            if turn is not None:
                aim = aim @ turn.T
            if mask is not None:
                mine, aim = mine[mask], aim[mask]
            total = total + (mine - aim).square().sum() / aim.square().sum().clamp_min(TINY)
        return total / len(goals)

    def turned(
        self, own: Sequence[dict[int, Tensor]], goals: Sequence[tuple[Tensor, ...]]
    ) -> Hidden:
        """Return goals in the coordinates that a model has already, as far as a turn brings them.

        own, goals: rows (n, m) of real tokens, of several batches. R = argmin over orthogonal R of
        Σ_l ‖z_l - goal_l Rᵀ‖² / ‖goal_l‖² (Schönemann 1966), for a child that was fused in another
        way, or not at all.
        """
        width = goals[0][0].shape[-1]
        cross = torch.zeros(width, width, dtype=torch.float64)
        for block in range(len(self.blocks)):
            one, scale = torch.zeros_like(cross), 0.0
            for streams, aims in zip(own, goals, strict=True):
                mine, aim = (x.double().cpu() for x in (streams[block + 1], aims[block]))
                if self.centred:
                    mine, aim = (x - x.mean(1, keepdim=True) for x in (mine, aim))
                one += mine.T @ aim
                scale += float(aim.square().sum())
            cross += one / max(scale, TINY)
        left, _, right = torch.linalg.svd(cross)
        return replace(self, turn=(left @ right).float())
