"""How narrow a space can be: the spectrum of its activations, weighted by what they matter.

With A = E[a aᵀ] of what is read and G the Gauss-Newton matrix of the loss by it, no replacement of
rank m raises the linearised loss by less than ½ Σ_{i>m} λ_i, λ = eig(A^½ G A^½) (Eckart & Young for
the norm of G). From n rows of activations and m gradients the λ are squared singular values of
X Yᵀ/√(n m): no matrix of the width is made.
Source: arXiv 2106.16225; diagnostics.md §1.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import token_mask
from slimfuse.diagnose.answers import Kind, Labelled, Read, flat
from slimfuse.diagnose.probing import Patience, only, probe

ROWS = 1024  # of activations and of gradients each, for a spectrum


@dataclass(frozen=True)
class Spectrum:
    """The loss-weighted spectrum of one space.

    values: λ (k,), descending, in nats a sample times two; width: of the space; rows: what it
    rests on, so that k can't be larger.
    """

    name: str
    values: Tensor
    width: int
    rows: int

    def effective(self, share: float) -> int:
        """Return the least rank that keeps a share of Σλ."""
        total = float(self.values.sum())
        if total <= 0:
            return 0
        kept = self.values.cumsum(0) / total
        return int((kept < share).sum()) + 1

    def tail(self, rank: int) -> float:
        """Return ½ Σ_{i>rank} λ_i: what the loss rises by at least."""
        return float(self.values[rank:].sum()) / 2


def weighted_spectrum(rows: Tensor, slopes: Tensor) -> Tensor:
    """Return eig(A^½ G A^½), descending, of A = XᵀX/n and G = YᵀY/m.

    rows: X (n, width); slopes: Y (m, width).
    """
    # of many rows their triangular roots: never more than the width, nor than the rows
    x, y = (
        torch.linalg.qr(z, mode="r").R if len(z) > z.shape[1] else z
        for z in (rows.double(), slopes.double())
    )
    joint = x @ y.T / (len(rows) * len(slopes)) ** 0.5
    gram = joint @ joint.T if len(joint) <= joint.shape[1] else joint.T @ joint
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0)  # half the time of singular values
    return values.clamp_min(0)


def spectra(
    model: nn.Module,
    batches: Iterable[Labelled],
    sites: Mapping[str, str],
    kind: Kind,
    read: Read = flat,
    *,
    seed: int = 0,
    patience: Patience | None = None,
) -> tuple[list[Spectrum], int]:
    """Return the spectra of what some modules read, and how many samples they rest on.

    sites: paths of modules by the names of the spaces; tokens that only pad don't count. A seeded
    draw of `ROWS` tokens is kept. Cost: one forward and backward pass.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {name: (Drawn(ROWS), Drawn(ROWS)) for name in sites}
    count = 0
    for given in (patience or Patience()).over(batches):
        with reading(model, sites) as seen, only(model), torch.enable_grad():
            value = probe(model, given, kind, generator, read)
            slopes = torch.autograd.grad(value, list(seen.values()), allow_unused=True)
        mask, count = token_mask(given[0]), count + len(given[0])
        for (name, x), g in zip(seen.items(), slopes, strict=True):
            g = torch.zeros_like(x) if g is None else g
            for drawn, values in zip(kept[name], (x.detach(), g), strict=True):
                drawn.add(_flat(values, mask), generator)
    tokens = kept[next(iter(sites))][0].seen
    each = tokens / max(1, count)  # the loss of a sample is a sum over its tokens
    found = []
    for name, (rows, gradients) in kept.items():
        values = each * weighted_spectrum(rows.rows, gradients.rows)
        found.append(Spectrum(name, values, rows.rows.shape[1], len(rows.rows)))
    return found, count


class Drawn:
    """A random draw of at most `most` of all rows that come by, in the memory of the draw."""

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0
        self.rows = torch.empty(0)
        self._keys = torch.empty(0, dtype=torch.float64)

    def add(self, rows: Tensor, generator: torch.Generator) -> None:
        """Let rows (n, width) take part: those with the largest random keys stay."""
        self.seen += len(rows)
        keys = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        keys = torch.cat([self._keys, keys])
        rows = torch.cat([self.rows, rows]) if len(self.rows) else rows
        if len(keys) > self.most:
            keys, places = keys.topk(self.most)
            rows = rows[places]
        self._keys, self.rows = keys, rows.clone()  # not a view of the whole batch


@contextmanager
def reading(model: nn.Module, sites: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Yield what the modules read in the next pass, ready for gradients."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def observe(
            _module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = given[0] if given else named["hidden_states"]
            seen[name] = x = x if x.requires_grad else x.requires_grad_()
            return ((x, *given[1:]), named) if given else (given, {**named, "hidden_states": x})

        return observe

    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, path in sites.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _flat(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and values.shape[: mask.ndim] == mask.shape:
        values = values[mask.to(values.device)]
    return values.reshape(-1, values.shape[-1]).cpu()


@dataclass(frozen=True)
class Proposal:
    """Widths for a budget. rise: the least rise of the loss they come to; trusted: whether that is
    small enough for a quadratic.
    """

    widths: tuple[int, ...]
    rise: float
    trusted: bool


TRUST = 0.1
"""Nats: beyond them the loss is no quadratic of the change any more."""


def allocate(
    found: Sequence[Spectrum],
    costs: Sequence[float],
    budget: float,
    *,
    floor: float = 0.25,
    step: int = 1,
    trust: float = TRUST,
) -> Proposal:
    """Share a budget out among spaces so that the least rise of the loss is smallest.

    costs: of a unit of each space; budget: of all; floor: the share of its width that each space
    keeps in any case; step: units at a time. Greedy by what a unit's tail is worth for its cost:
    optimal to a step, since tails are convex.
    """
    widths = [max(1, min(s.width, round(floor * s.width))) for s in found]
    left = budget - sum(c * w for c, w in zip(costs, widths, strict=True))
    queue: list[tuple[float, int]] = []

    def gain(i: int) -> float:
        more = min(step, found[i].width - widths[i])
        return (found[i].tail(widths[i]) - found[i].tail(widths[i] + more)) / (costs[i] * more)

    for i, s in enumerate(found):
        if widths[i] < s.width:
            heapq.heappush(queue, (-gain(i), i))
    while queue:
        _, i = heapq.heappop(queue)
        more = min(step, found[i].width - widths[i])
        if costs[i] * more > left + 1e-9:
            continue
        widths[i] += more
        left -= costs[i] * more
        if widths[i] < found[i].width:
            heapq.heappush(queue, (-gain(i), i))
    rise = sum(s.tail(w) for s, w in zip(found, widths, strict=True))
    return Proposal(tuple(widths), rise, rise <= trust)
