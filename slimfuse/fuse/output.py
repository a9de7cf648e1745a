"""What a model without a head gives: its last hidden state, the parents' up to a rotation.

Cosine similarities, nearest neighbours and linear readers don't see a rotation of the features, so
the target's output o only has to be an isometric image of the parents' y (of their consensus,
where there are several): o ≈ O Uᵀ y with orthonormal columns U (d, m) and O (m, m).
Pre-norm: o = γ n + β with n the target's normalised stream. With y ≈ X n + c by least squares and
X = U S, S = (XᵀX)^½ symmetric, the wanted output is S n, up to O. A pre-norm stream may be turned
inside the complement of the ones: if R turns it, o = diag(γ) R n, whose inner products are those of
Rᵀ diag(γ²) R; for any R the best γ² has a closed form. R is the best of three: none; what leads the
stream back to channels of the first parent's, exact where the width stays; and what turns the
eigenvectors of S into channels, but for a direction that the norm takes away.
Post-norm: the output is the stream itself, see `post_norm`.
In both, the mean of y has a part outside the span of what the target can say of y. It is the same
for all inputs, and the direction of the ones, which no varying part uses, takes it up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimfuse.fuse import walk
from slimfuse.fuse.fits import Fit
from slimfuse.fuse.solve import directed, ridge, roots
from slimfuse.fuse.stream import centring, consensus, pivots
from slimfuse.fuse.tied import turn
from slimfuse.fuse.walk import flat, rows

if TYPE_CHECKING:
    from slimfuse.fuse.builder import Builder

LEAST = 1e-9  # strength of these least squares, which are of few unknowns
NOUGHT = 1e-6  # of the largest singular value, or of the mean


def fit_output(builder: Builder) -> None:
    """Fit the last norm of a target without a head, and the pooler that nothing reads."""
    if not builder.norms_stay:
        if builder.layout.final_norm:
            _fit_norm(builder)
        else:
            _keep_mean(builder)
    if builder.layout.unread is not None:
        builder._fit_unread()


def _fit_norm(builder: Builder) -> None:
    """Fit the last norm's gain and shift, and turn the stream for it."""
    layout, union, run = builder.layout, builder.union, builder.run
    name, size = layout.final_norm, builder.shape.hidden_size
    norm = builder.target.get_submodule(name)
    assert isinstance(norm, nn.LayerNorm), "a turned stream with another norm keeps its mean"
    norm.weight.fill_(1)
    norm.bias.fill_(0)
    sites = [f"y{p}" for p in range(len(union))]
    moments = builder._moments(**dict(zip(sites, union.widths, strict=True)), t=size)
    for b in range(len(run.sizes)):
        width = sum(moments.widths.values())
        places, weights = builder.draw(2 * len(layout.blocks), b, width, "reading")
        pairs = zip(union.parents, run.streams(b), strict=True)
        seen = [flat(walk.apply(p.model, name, x), places) for p, x in pairs]
        own = flat(walk.apply(builder.target, name, run.stream(b)), places)
        moments.update(weights, t=own, **dict(zip(sites, seen, strict=True)))
    joint = torch.cat([torch.cat([moments.cov(a, b) for b in sites], 1) for a in sites])
    shares = [p.weight for p in union.parents]
    mix = torch.cat(consensus(joint, union.widths, shares, centred=False).mixes, dim=1)
    project = centring(size)
    cov = project @ moments.cov("t") @ project
    cross = mix @ torch.cat([moments.cov(site, "t") for site in sites]) @ project
    read = ridge(cross, cov, torch.zeros_like(cross), LEAST) @ project
    wanted, root = roots(read.T @ read)[0], roots(cov)[0]
    found = [(*_gain(r, wanted @ wanted, root), r) for r in _turns(builder, read)]
    gain, _, rotation = min(found, key=lambda one: one[1])
    if builder.turns:
        turn(builder, rotation.T)
        for b in range(len(run.sizes)):
            z = run.stream(b)
            run.cache.put("z", b, z @ rotation.T.to(z))
    told = gain[:, None] * rotation
    u, _, vh = torch.linalg.svd(told @ cov @ wanted)
    mean = moments.mean("y0")  # the others' streams are read about their means
    norm.weight.copy_(gain)
    norm.bias.copy_(u @ vh @ _image(read, mean).T @ mean - told @ moments.mean("t"))
    whole, bent = mix @ joint @ mix.T, (told - u @ vh @ wanted) @ root
    missed = whole.trace() - (read @ cov * read).sum() + bent.square().sum()
    fitted = Fit(told, norm.bias.double(), float(missed), LEAST)
    builder._note(name, fitted, len(layout.blocks), float(whole.trace()))


def _turns(builder: Builder, read: Tensor) -> list[Tensor]:
    """Return the turns R (m, m) to choose from, all with R 1 = 1; read: X (d, m)."""
    size = builder.shape.hidden_size
    none, project = torch.eye(size, dtype=torch.float64), centring(size)
    ones = none - project
    if not builder.turns:
        return [none]
    encode = _rows(builder.mixes[0])
    picks = encode[:, torch.tensor(pivots(encode.T @ encode, size))].T
    u, _, vh = torch.linalg.svd(project @ picks @ project + ones)
    gram = read.T @ read
    basis = directed(torch.linalg.eigh(gram + 2 * gram.trace() * ones).eigenvectors[:, :-1])
    return [none, u @ vh, _like_channels(size) @ basis.T + ones]


def _rows(matrix: Tensor) -> Tensor:
    """Return the nearest partial isometry: singular values one, or nought where they were."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    found: Tensor = (u * (s > NOUGHT * s.max())) @ vh
    return found


def _like_channels(size: int) -> Tensor:
    """Return an orthonormal basis (m, m - 1) of the complement of the ones, each near a channel."""
    eye = torch.eye(size, dtype=torch.float64)
    axis = eye[-1] - size**-0.5
    mirror: Tensor = eye - 2 * torch.outer(axis, axis) / axis.square().sum()
    return mirror[:, :-1]


def _gain(rotation: Tensor, wanted: Tensor, root: Tensor) -> tuple[Tensor, float]:
    """Return γ (m,) of the least e = |C^½ (Rᵀ diag(γ²) R - wanted) C^½|², and e; root: C^½."""
    seen = rotation @ root
    goal = root @ wanted @ root
    aim = (seen @ goal @ seen.T).diagonal()
    square = ridge(aim[None], (seen @ seen.T).square(), 0 * aim[None], LEAST)[0].clamp_min(0)
    error = seen.T @ (square[:, None] * seen) - goal
    return square.sqrt(), float(error.square().sum())


def _image(read: Tensor, mean: Tensor) -> Tensor:
    """Return U (d, m) of X = U S; where S is nought, the part of the mean that X can't say."""
    u, s, vh = torch.linalg.svd(read, full_matrices=False)
    kept = s > NOUGHT * s.max()
    known: Tensor = u[:, kept]
    found: Tensor = known @ vh[kept]
    lost = mean - known @ (known.T @ mean)
    if bool(kept.all()) or float(lost.norm()) <= NOUGHT * float(mean.norm()):
        return found
    found += torch.outer(lost / lost.norm(), vh[~kept][-1])
    return found


def _keep_mean(builder: Builder) -> None:
    """Give the last shift of a post-norm target what its map leaves out of the parents' mean.

    Only where the map leaves the direction of the ones free; the anchor's stands for all.
    """
    encode = _rows(builder.mixes[0])
    if float(encode.sum(0).norm()) > NOUGHT * float(encode.norm()):
        return
    layout, run, sums, count = builder.layout, builder.run, torch.zeros(()), 0.0
    for b in range(len(run.sizes)):
        weights = builder.draw.weights(2 * len(layout.blocks), b)
        sums, count = sums + weights @ rows(run.streams(b)[0]), count + float(weights.sum())
    sums = builder.ranks.sum(sums)
    count = float(builder.ranks.sum(torch.tensor(count, dtype=torch.float64)))
    lost = (sums / count).square().sum() - (encode @ sums / count).square().sum()
    norm = builder.target.get_submodule(layout.norm_at(2 * len(layout.blocks)))
    assert isinstance(norm, nn.LayerNorm)
    norm.bias.add_(float(lost.clamp_min(0) / len(encode)) ** 0.5)
