"""What a parent and the anchor do on the same rows, read branch by branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs
from slimfuse.families import Block, Layout
from slimfuse.fuse import walk
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.transport_policies import TransportSettings, kept_tokens
from slimfuse.moments import Moments

Two = tuple[Tensor, Tensor]  # one thing of the parent (x) and of the anchor (y)
Sites = dict[str, Moments]  # sites x and y a name


class Reading:
    """Both models' streams at one depth, and the moments of the branches that they pass.

    Without batches there are no streams, and no site is ever seen.
    """

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module],
        layout: Layout,
        config: Any,
        settings: TransportSettings,
        tick: Callable[[], None],
        cache: StreamCache,
    ) -> None:
        self.models, self.layout, self.config = models, layout, config
        self.settings, self.tick = settings, tick
        self.cache = cache
        self.starts: list[tuple[walk.Start, ...]] = []

    def embed(self, batches: Iterable[Inputs]) -> Moments | None:
        """Start the streams and return their moments."""
        seen = None
        for batch in batches:
            begun = tuple(walk.start(m, self.layout, batch) for m in self.models)
            x, y = (start.stream for start in begun)
            self.starts.append(begun)
            self._put(len(self.starts) - 1, x, y)
            seen = self._see(seen, x, y, begun[0].mask, before_mixing=True)
            self.tick()
        return seen

    def attention(self, layer: int) -> tuple[Sites, Tensor | None]:
        """Pass an attention: sites q, k, units (what the output projection reads), branch.

        Returns also the root mean squares (m,) of the anchor's stream before it.
        """
        block = self.layout.blocks[layer]
        early = set() if layer else {"q", "k"}  # these haven't seen another token yet
        return self._pass(
            lambda model, x, begun: _attend(model, block, x, begun.calls[layer]), early
        )

    def mlp(self, layer: int) -> tuple[Sites, Tensor | None]:
        """Pass an MLP: sites units (what the second layer reads), branch; see `attention`."""
        block = self.layout.blocks[layer]
        return self._pass(lambda model, x, _: _mlp(model, block, x), set())

    def _pass(
        self, run: Callable[[nn.Module, Tensor, walk.Start], dict[str, Tensor]], early: set[str]
    ) -> tuple[Sites, Tensor | None]:
        sites: Sites = {}
        skip = _Power()
        for i, begun in enumerate(self.starts):
            x, y = (self.cache.get(who, i) for who in "xy")
            mask = begun[0].mask
            skip.see(self._kept(y, mask, before_mixing=False))
            ours, theirs = (run(*one) for one in zip(self.models, (x, y), begun, strict=True))
            for site, seen in ours.items():
                sites[site] = self._see(
                    sites.get(site), seen, theirs[site], mask, before_mixing=site in early
                )
            self._put(i, x + ours["branch"], y + theirs["branch"])
            self.tick()
        return sites, skip.root()

    def _put(self, batch: int, x: Tensor, y: Tensor) -> None:
        self.cache.put("x", batch, x)
        self.cache.put("y", batch, y)

    def _see(
        self,
        seen: Moments | None,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        *,
        before_mixing: bool,
    ) -> Moments:
        x, y = (self._kept(t, mask, before_mixing=before_mixing) for t in (x, y))
        seen = seen or Moments(x=x.shape[1], y=y.shape[1])
        seen.update(x=x, y=y)
        return seen

    def _kept(self, x: Tensor, mask: Tensor | None, *, before_mixing: bool) -> Tensor:
        """Return the rows of the real tokens that count.

        The readout token alone says nothing before tokens mix, because it is the same in every
        sample: there all tokens count.
        """
        settings, layout = self.settings, self.layout
        keep = kept_tokens(
            settings.tokens, settings.window, x.shape[1], layout.readout, self.config
        )
        if before_mixing and len(keep) == 1:
            keep = torch.arange(x.shape[1])
        rows = walk.rows(x[:, keep])
        return rows if mask is None else rows[mask[:, keep].flatten()]


class _Power:
    """Root mean squares of columns, streamed."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None

    def see(self, rows: Tensor) -> None:
        power = rows.square().sum(0).cpu()
        self.total = power if self.total is None else self.total + power
        self.count += len(rows)

    def root(self) -> Tensor | None:
        return None if self.total is None else (self.total / self.count).sqrt()


def deviations(seen: Moments) -> Two:
    """Return the standard deviations of a site's units."""
    x, y = (seen.cov(s).diagonal().clamp_min(0).sqrt() for s in "xy")
    return x, y


def anchor_norms(seen: Moments) -> Tensor:
    """Return the root mean squares (m,) of the anchor's units."""
    return seen.second("y").diagonal().clamp_min(0).sqrt()


def _attend(model: nn.Module, block: Block, stream: Tensor, told: walk.Call) -> dict[str, Tensor]:
    normed = walk.apply(model, block.attention_norm, stream)
    units = walk.attend(model, block, stream, told)
    return {
        "q": walk.apply(model, block.q, normed),
        "k": walk.apply(model, block.k, normed),
        "units": units,
        "branch": walk.apply(model, block.o, units),
    }


def _mlp(model: nn.Module, block: Block, stream: Tensor) -> dict[str, Tensor]:
    units, branch = walk.mlp(model, block, stream)
    return {"units": units, "branch": branch}
