"""A masked language model's head: logits T h + c, h = γ n(a(W x + b)) + β, T the embeddings' table.

The target's table T_t is written with the embeddings, so that of the parents' mean logits
Σ_p w_p (T_p h_p + c_p) only what lies in its span is left to say: h* = Σ_p w_p B_p h_p, with
B_p = (T_tᵀ P T_t)⁺ T_tᵀ P T_p and P the projection that removes the mean over the vocabulary, which
a softmax doesn't see. Errors of h count by G = T_tᵀ P T_t; c takes up what they leave of the means.

W is fitted to pre-activations: where the stream's map chooses channels, those of the parents' own
units, which is exact for permuted and widened copies. A rotated stream asks for units that are
mixes of activations, which no least squares gives; so γ, β, W and b then go downhill together
(L-BFGS) from there, on four fifths of the rows, as long as the others gain by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimfuse.families import Transform
from slimfuse.fuse import walk
from slimfuse.fuse.fits import Fit, fit, statistics
from slimfuse.fuse.labels import Goals, mean_shares
from slimfuse.fuse.solve import RANK_TOLERANCE, ridge, roots
from slimfuse.fuse.tables import centred_gram, slices

if TYPE_CHECKING:
    from slimfuse.fuse.builder import Builder

ROWS = 8192  # that the gains and the descent see
HELD = 5  # every fifth row says when the descent ends …
PATIENCE = 5  # … after so many steps without gain, or after …
STEPS = 60
EXACT = 1e-9  # share of the variance below which nothing is left to gain
LEAST = 1e-9  # strength of the gains' least squares


def fit_words(builder: Builder, goals: Goals) -> None:
    """Fit the transform and the bias of a head whose weight is the embeddings' table.

    Raises ParentError for other goals than the mean of the parents' logits.
    """
    layout, union, target = builder.layout, builder.union, builder.target
    assert layout.transform is not None, "a head that reads the stream is `fit_vocabulary`'s"
    shares = mean_shares(goals)
    if builder.norms_stay:
        return
    table = target.get_parameter(f"{layout.head}.weight")
    tables = [state[f"{layout.head}.weight"] for state in union.states]
    grams = centred_gram([table, *tables])
    width = table.shape[1]
    metric, outer = grams[:width, :width], grams[width:, width:]
    read = torch.linalg.pinv(metric, rtol=RANK_TOLERANCE, hermitian=True) @ grams[:width, width:]
    _fit_dense(builder, layout.transform, width)
    stream, features = _rows(builder)
    scaled = torch.cat([w * h for w, h in zip(shares, features, strict=True)], dim=1)
    head = _Head(target, layout.transform, roots(metric)[0])
    goal = scaled @ read.T
    head.fit_gain(stream, goal)
    centred = scaled - scaled.mean(0)
    whole = float((centred @ outer * centred).sum() / len(centred))
    if head.missed(stream, goal) > EXACT * whole:
        head.descend(stream, goal)
    told = head(stream).mean(0)
    last = target.get_submodule(layout.head)
    assert isinstance(last.bias, Tensor)
    for part in slices(len(table)):
        wanted = torch.cat([t[part].double() for t in tables], dim=1) @ scaled.mean(0)
        for weight, state in zip(shares, union.states, strict=True):
            wanted += weight * state[f"{layout.head}.bias"][part].double()
        last.bias[part] = wanted - table[part].double() @ told
    inside = goal - goal.mean(0)
    lost = whole - float((inside @ metric * inside).sum() / len(inside))
    found = Fit(head.norm.weight, head.norm.bias, lost + head.missed(stream, goal), "descent")
    builder._note(layout.head, found, len(layout.blocks), whole)


def _fit_dense(builder: Builder, transform: Transform, width: int) -> None:
    """Fit the dense layer to the pre-activations of the parents' units."""
    layout, union, run = builder.layout, builder.union, builder.run
    last, key = 2 * len(layout.blocks), f"{transform.dense}.weight"
    mixes = builder.mixes
    if not layout.tied:  # the table is the first parent's
        each = [torch.eye(len(state[key])).double()[:width] for state in union.states]
        mixes = [each[0], *(0 * one for one in each[1:])]
    sites = {f"n{p}": size for p, size in enumerate(union.widths)}
    moments = builder._moments(goal=width, t=builder.shape.hidden_size, **sites)

    def inputs(batch: int, places: Tensor) -> Tensor:
        return walk.rows(run.stream(batch), places)

    def wanted(batch: int, places: Tensor) -> Tensor:
        total = torch.zeros(len(places), width, dtype=torch.float64)
        for parent, x, mix in zip(union.parents, run.streams(batch), mixes, strict=True):
            units = walk.apply(parent.model, transform.dense, walk.flat(x, places))
            total += units.double() @ mix.T
        return total

    for b in range(len(run.sizes)):
        places, weights = builder.draw(last, b, sum(moments.widths.values()), "even")
        seen = [walk.flat(x, places) for x in run.streams(b)]
        moments.update(
            weights, goal=wanted(b, places), t=inputs(b, places),
            **dict(zip(sites, seen, strict=True)),
        )  # fmt: skip

    def prior() -> Tensor:
        ones = [torch.ones(size, dtype=torch.float64) for size in union.widths]
        moved = [
            mix @ state[key].double() @ builder._readback(moments, p, p, ones[p])
            for p, (mix, state) in enumerate(zip(mixes, union.states, strict=True))
        ]
        return torch.stack(moved).sum(0)

    weight, bias = builder._held(transform.dense, prior)
    stats = statistics(moments, "goal", "t")
    groups = run.judges(last, sum(moments.widths.values()), inputs, wanted, "even")
    found = fit(stats, weight, builder.settings.ridge, groups, bias, builder.ranks)
    builder._write(transform.dense, found, len(layout.blocks), stats.variance)


def _rows(builder: Builder) -> tuple[Tensor, list[Tensor]]:
    """Return the target's stream and every parent's h at evenly spaced real tokens, float64."""
    layout, union, run = builder.layout, builder.union, builder.run
    step = max(1, builder.draw.rows // ROWS)
    found: list[tuple[int, Tensor, list[Tensor]]] = []
    for b in range(len(run.sizes)):
        places = builder.draw.weights(2 * len(layout.blocks), b, "even").nonzero()[::step, 0]
        features = [
            walk.read_out(parent.model, layout, walk.flat(x, places)[None]).double()
            for parent, x in zip(union.parents, run.streams(b), strict=True)
        ]
        found.append((builder.draw.number(b), walk.rows(run.stream(b), places), features))
    found = sorted(builder.ranks.gather(found), key=lambda one: one[0])  # the descent sees all
    every = zip(*(features for _, _, features in found), strict=True)
    return torch.cat([rows for _, rows, _ in found]), [torch.cat(parts) for parts in every]


class _Head:
    """The target's transform; root: G^½, by which errors of h count."""

    def __init__(self, target: nn.Module, transform: Transform, root: Tensor) -> None:
        dense, norm = (target.get_submodule(p) for p in (transform.dense, transform.norm))
        assert isinstance(dense, nn.Linear) and isinstance(norm, nn.LayerNorm)
        self.dense, self.norm, self.root = dense, norm, root
        self.activation = transform.activation

    def normed(self, stream: Tensor) -> Tensor:
        """Return n (r, e), float64: the norm's input without mean and scale."""
        units = self.activation(self.dense(stream.to(self.dense.weight)))
        return nn.functional.layer_norm(units, units.shape[1:], eps=self.norm.eps).double()

    def __call__(self, stream: Tensor) -> Tensor:
        """Return h (r, e), float64."""
        return self.norm.weight.double() * self.normed(stream) + self.norm.bias.double()

    def missed(self, stream: Tensor, goal: Tensor) -> float:
        """Return E|G^½ (goal - h)|² about its mean, which the head's bias takes up."""
        gap = goal - self(stream)
        return float(((gap - gap.mean(0)) @ self.root).square().sum() / len(gap))

    def fit_gain(self, stream: Tensor, goal: Tensor) -> None:
        """Fit γ and β by least squares; the norm of each channel alone is where no other says."""
        n = self.normed(stream)
        n_mean, mean = n.mean(0), goal.mean(0)
        n, goal = n - n_mean, goal - mean
        metric = self.root @ self.root
        alone = (goal * n).sum(0) / n.square().sum(0).clamp_min(1e-30)
        aim = (metric @ (goal.T @ n)).diagonal()
        gain = ridge(aim[None], metric * (n.T @ n), alone[None], LEAST)[0]
        self.norm.weight.copy_(gain)
        self.norm.bias.copy_(mean - gain * n_mean)

    def descend(self, stream: Tensor, goal: Tensor) -> None:
        """Improve all parameters together on some rows, as long as the others gain by it."""
        parameters = [*self.dense.parameters(), *self.norm.parameters()]
        held = torch.arange(len(stream)) % HELD == HELD - 1
        few, wanted = stream[~held].to(self.dense.weight), goal[~held]
        root, kind = self.root.to(self.dense.weight), self.dense.weight.dtype
        wanted = wanted.to(kind)
        scale = float(((goal - goal.mean(0)) @ self.root).square().sum() / len(goal))
        search = torch.optim.LBFGS(
            parameters, max_iter=1, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            search.zero_grad()
            gap = wanted - self.norm(self.activation(self.dense(few)))
            value: Tensor = ((gap - gap.mean(0)) @ root).square().sum() / (len(gap) * scale)
            value.backward()
            return value

        best = self.missed(stream[held], goal[held])
        kept, waited = [p.clone() for p in parameters], 0
        flags = [p.requires_grad for p in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        for _ in range(STEPS):
            with torch.enable_grad():
                search.step(loss)
            error = self.missed(stream[held], goal[held])
            waited = 0 if error < best else waited + 1
            if error < best:
                best, kept = error, [p.detach().clone() for p in parameters]
            if waited == PATIENCE:
                break
        for parameter, value, flag in zip(parameters, kept, flags, strict=True):
            parameter.grad = None
            parameter.copy_(value)
            parameter.requires_grad_(flag)
