"""A head whose weight is the table of embeddings, which already writes the stream.

With T the target's table of embeddings (rows, m) and n its normed stream, what such a head gives is
T S n: only what stands between is free. The normal equations of a symmetric S,
A S C + S C A = N + Nᵀ with A = TᵀPT, C = E[n nᵀ], N = TᵀP E[goal nᵀ] and P the projection that
removes the mean over tokens of the vocabulary, fall apart in the basis that makes C one and A
diagonal. A norm's gain g gives only diagonal S; but a stream may be turned by any Q that its norms
don't see, once their gains are in the readers, and then S = Q diag(g) Qᵀ.

RMSNorm: any orthogonal Q will do, so S is any symmetric matrix. A single parent's own head is
E diag(γ) and moves exactly where the stream keeps its width. A narrower one loses what of the
parents' head lies outside the span of T: an untied head is W X with X (d, m) free.

LayerNorm: Q must keep the direction of the ones. Then m channels carry the m - 1 eigenvectors
u of S: R u with R (m, m - 1) = 1 - α 11ᵀ over a row of -1/√m, whose Rᵀ diag(g) R differs from
diag(g) by about 1/m of its variance. In return, what T has along the ones, e 1ᵀ, is free: no norm
sees it in the embeddings, and as a head it adds e (1ᵀ(g n + β)), a direction of logits and a bias
of every token. e and g are fitted in turns, β last.

Norms behind the branches hold the channels in place: nothing is turned, and S is diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimfuse.fuse.fits import Fit, Statistics
from slimfuse.fuse.solve import RANK_TOLERANCE, ridge
from slimfuse.fuse.stream import centring, pivots
from slimfuse.fuse.tables import slices
from slimfuse.spaces import LinearMap, transform

if TYPE_CHECKING:
    from slimfuse.fuse.builder import Builder

ROUNDS = 4  # of e and g in turns; the first two settle them
LEAST = 1e-3  # of e in what it says of the logits' variance: its size stays that of a table


@dataclass(frozen=True)
class Tables:
    """The target's table and the parents' heads side by side, by what is asked of them.

    gram: (m + Σd, m + Σd), centred over rows; cross: Cov[features, n] (Σd, m) and mean: (Σd,) of
    the parents' features, weighted, and own: the mean (m,) of n; about zero where means are zeros.
    ones: (Σd,) what leads the ones of the parents' channels to the target's.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    own: Tensor
    ones: Tensor

    @property
    def few(self) -> int:
        """Columns of the target's table."""
        return self.cross.shape[1]

    @property
    def outer(self) -> Tensor:
        """A (m, m)."""
        return self.gram[: self.few, : self.few]

    @cached_property
    def inverse(self) -> Tensor:
        """The pseudo-inverse of A."""
        found: Tensor = torch.linalg.pinv(self.outer, rtol=RANK_TOLERANCE, hermitian=True)
        return found

    @property
    def aim(self) -> Tensor:
        """N (m, m)."""
        return self.gram[: self.few, self.few :] @ self.cross

    def turned(self, q: Tensor) -> Tables:
        """Return the same of the stream turned to q n; centred along channels is the table."""
        whole = torch.block_diag(q, torch.eye(len(self.mean), dtype=q.dtype))
        return Tables(
            whole @ self.gram @ whole.T, self.cross @ q.T, self.mean, q @ self.own, self.ones
        )


@dataclass(frozen=True)
class Tied:
    """What stands between table and stream: the norm's gain (m,) and shift (m,), and e.

    extra: e as a mix of the columns of `Tables` (m + Σd,); missed: of the logits' variance.
    """

    gain: Tensor
    shift: Tensor
    extra: Tensor
    missed: float


def tie(builder: Builder, stats: Statistics, free: Fit, prior: Tensor, tables: Tables) -> None:
    """Fit and set what stands between a tied table and the stream; see the module.

    free, prior: the untied head's fit, whose ridge is taken over, and its transported weights as
    read from the parents' features (Σd, m).
    """
    layout, shares = builder.layout, [len(back) for back in builder.readbacks]
    assert layout.final_norm and not builder.norms_stay, "a tied head is fitted by its norm's gain"
    # where x ≈ B z, a parent's table is about T Bᵀ, but for the factors of the embeddings
    scales = [layout.embed_scale / own.embed_scale for own in builder.union.layouts]
    parts = zip(scales, builder.readbacks, prior.split(shares), strict=True)
    start = torch.stack([scale * back.T @ read for scale, back, read in parts]).sum(0)
    start = (start + start.T) / 2
    strength = free.strength if isinstance(free.strength, float) else float("inf")
    turns = builder.turns and not layout.blocks[0].attention_post
    if layout.norm == "rms":
        found = _rms(builder, stats, start, strength, tables, turns=turns)
    else:
        found = _layer(builder, stats, start, strength, tables, turns=turns)
    norm = builder.target.get_submodule(layout.final_norm)
    assert isinstance(norm.weight, Tensor)
    norm.weight.copy_(found.gain)
    if layout.norm == "layer":
        assert isinstance(norm.bias, Tensor)
        norm.bias.copy_(found.shift)
    told = Fit(found.gain, found.shift, found.missed, strength)
    builder._note(layout.head, told, len(layout.blocks), stats.variance)


def _rms(
    builder: Builder, stats: Statistics, start: Tensor, strength: float, tables: Tables, *,
    turns: bool,
) -> Tied:  # fmt: skip
    if turns:
        middle = symmetric(tables.outer, stats.gram, tables.aim, start, strength)
        gain, rotation = torch.linalg.eigh(middle)
        turn(builder, rotation)
    else:
        gain = diagonal(tables.outer, stats.gram, tables.aim, start.diagonal(), strength)
        middle = gain.diag()
    told = (middle @ tables.outer @ middle * stats.gram).sum()
    missed = stats.variance - 2 * (middle * tables.aim).sum() + told
    none = torch.zeros_like(gain)
    return Tied(gain, none, torch.zeros(len(tables.gram), dtype=gain.dtype), float(missed))


def _layer(
    builder: Builder, stats: Statistics, start: Tensor, strength: float, tables: Tables, *,
    turns: bool,
) -> Tied:  # fmt: skip
    if not turns:
        return _channels(stats, tables, start.diagonal(), strength, extra=False)
    size = len(start)
    project = centring(size)
    tables, start = tables.turned(project), project @ start @ project
    found, best = _channels(stats, tables, _seen(start), strength), None
    for q in _turns(builder, stats, start, strength, tables):
        gram, inner = q @ stats.gram @ q.T, _seen(q @ start @ q.T)
        other = _channels(stats, tables.turned(q), inner, strength, gram=gram)
        if other.missed < found.missed:
            found, best = other, q
    if best is not None:
        turn(builder, best.T)
    table = builder.target.get_parameter(builder.layout.embed_parameters[0])
    heads = [state[f"{builder.layout.head}.weight"] for state in builder.union.states]
    own, others = found.extra[:size], found.extra[size:]
    for part in slices(len(table)):
        rows = table[part].double()
        rows = rows - rows.mean(1, keepdim=True)
        beside = torch.cat([head[part].double() for head in heads], dim=1)
        table[part] = rows + (rows @ own + beside @ others)[:, None]
    return found


def _turns(
    builder: Builder, stats: Statistics, start: Tensor, strength: float, tables: Tables
) -> Iterator[Tensor]:
    """Yield the turns Q (m, m), Q 1 = 1, to choose from beside none.

    What leads the stream back to channels of the first parent's, exact where the width stays; what
    turns the eigenvectors of S into channels.
    """
    size = len(start)
    encode = builder.mixes[0]
    picks = encode[:, torch.tensor(pivots(encode.T @ encode, size))].T
    u, _, vh = torch.linalg.svd(centring(size) @ picks @ centring(size) + 1 / size)
    yield u @ vh
    basis = torch.linalg.eigh(centring(size))[1][:, 1:]
    a, c, aim, own = (basis.T @ x @ basis for x in (tables.outer, stats.gram, tables.aim, start))
    vectors = torch.linalg.eigh(symmetric(a, c, aim, own, strength))[1]
    frame = torch.eye(size - 1, dtype=start.dtype) - (1 - size**-0.5) / (size - 1)
    frame = torch.cat([frame, -torch.ones(1, size - 1, dtype=start.dtype) / size**0.5])
    yield frame @ (basis @ vectors).T + 1 / size


def _seen(middle: Tensor) -> Tensor:
    """Return g (m,) of S = P diag(g) P, P the projection that removes the mean over channels."""
    size = len(middle)
    mean = middle.trace() / (size - 1)
    found: Tensor = (middle.diagonal() - mean / size) / (1 - 2 / size)
    return found


def _channels(
    stats: Statistics, tables: Tables, start: Tensor, strength: float, *,
    gram: Tensor | None = None, extra: bool = True,
) -> Tied:  # fmt: skip
    """Return the gains of the channels as they stand, with e; the table is centred over channels.

    gram: C where the stream is turned, else that of `stats`; extra: whether there is an e.
    """
    few, spread = tables.few, stats.gram if gram is None else gram
    none = torch.zeros_like(tables.mean)
    goal = torch.cat([torch.zeros_like(spread), tables.cross])
    ones = torch.zeros(len(tables.gram), dtype=spread.dtype)
    if extra:  # the parents' own part along the ones
        ones[few:] = tables.ones
    level, gain = torch.zeros((), dtype=spread.dtype), start

    def normal() -> tuple[Tensor, Tensor]:
        """Return the normal equations of the gains with e as it is."""
        seen = tables.gram @ ones
        outer = tables.outer + seen[:few, None] + seen[:few] + ones @ seen
        return outer * spread, (tables.aim + seen @ goal).diagonal()

    for _ in range(ROUNDS if extra else 1):
        if isfinite(strength):
            square, aim = normal()
            gain = ridge(aim[None], square, start[None], strength)[0]
        constant = torch.cat([-gain * tables.own, tables.mean])
        if extra:
            read = spread @ gain
            slope = goal @ gain - torch.cat([gain * read, none])
            ones, level = _along_ones(tables, slope, constant, gain @ read)
    square, aim = normal()
    missed = stats.variance - 2 * (aim @ gain) + gain @ square @ gain
    left = constant - ones * level
    shift = _project(tables, left)
    gap = left - torch.cat([shift, none])
    if extra:
        shift = shift - shift.mean() + (level - gain @ tables.own) / few
    return Tied(gain, shift, ones, float(missed + gap @ tables.gram @ gap))


def _along_ones(
    tables: Tables, slope: Tensor, constant: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return e, and what it is multiplied by at the mean; mixes of the columns of `tables`.

    slope: covariance of what is missed with x = gᵀn; constant: the mean of what is missed;
    variance: of x. e = a + b with a in the span of the table, which the shift balances, and
    [σ slope, constant] ≈ b [σ, level] outside it (the best of rank one).
    """
    deviation = variance.clamp_min(1e-30).sqrt()
    slope = slope / variance.clamp_min(1e-30)
    none = torch.zeros_like(tables.mean)
    inside = [torch.cat([_project(tables, mix), none]) for mix in (slope, constant)]
    outside = torch.stack([(slope - inside[0]) * deviation, constant - inside[1]])
    first = torch.linalg.eigh(outside @ tables.gram @ outside.T)[1][:, -1]
    share = first[0].abs().clamp_min(LEAST) * (1.0 if first[0] >= 0 else -1.0)
    level = deviation * first[1] / share
    return inside[0] + (first @ outside) * share / deviation, level


def _project(tables: Tables, mix: Tensor) -> Tensor:
    """Return the mix (m,) of the target's table that is nearest to a mix of all columns."""
    found: Tensor = tables.inverse @ (tables.gram[: tables.few] @ mix)
    return found


def symmetric(a: Tensor, c: Tensor, aim: Tensor, start: Tensor, strength: float) -> Tensor:
    """Return the symmetric S that minimises tr(S A S C) - 2 tr(S N) with a ridge about `start`."""
    if not isfinite(strength):
        return start
    eye = torch.eye(len(c), dtype=c.dtype)
    lower = torch.linalg.cholesky(c + max(strength, RANK_TOLERANCE) * c.diagonal().mean() * eye)
    left = aim - a @ start @ c
    half = torch.linalg.solve_triangular(lower, eye, upper=False)
    values, basis = torch.linalg.eigh(half @ a @ half.T)
    basis = half.T @ basis  # basisᵀ C basis = 1, basisᵀ A basis = values
    sums = values[:, None] + values
    seen = sums > RANK_TOLERANCE * sums.max()
    inner = basis.T @ (left + left.T) @ basis / torch.where(seen, sums, 1)
    step: Tensor = basis @ torch.where(seen, inner, 0) @ basis.T
    return start + (step + step.T) / 2


def diagonal(a: Tensor, c: Tensor, aim: Tensor, start: Tensor, strength: float) -> Tensor:
    """Return the gains g that minimise tr(D A D C) - 2 tr(D N), D = diag(g), about `start`."""
    if not isfinite(strength):
        return start
    return ridge(aim.diagonal()[None], a * c, start[None], strength)[0]


def turn(builder: Builder, rotation: Tensor) -> None:
    """Turn the target's stream z to rotationᵀ z; its norms don't see the rotation."""
    atlas, space = builder.atlas, builder.layout.stream_space
    maps = {space: LinearMap(rotation, rotation)}
    kept = {f"{path}.{key}" for path in builder._norms() for key in ("weight", "bias")}
    for name, value in builder.target.named_parameters():
        if name in kept or not any(leg.space == space for axis in atlas.axes[name] for leg in axis):
            continue
        for part in builder._parts(name):
            moved = transform({name: value[part].double()}, atlas, maps, only=[name])
            value[part] = moved[name]
    builder.rotation = rotation
