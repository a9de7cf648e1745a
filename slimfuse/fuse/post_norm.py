"""Post-norm targets: what a branch has to add so that the norm behind it gives the wanted stream.

A post-norm stream is x = γ n(u) + β: what a norm makes of the sum u of the stream before and a
branch, n(u) = (u - mean) / std over channels. A norm forgets the scale of u, so a target's sum only
has to be in proportion. With the wanted stream w = Σ_p M_p x_p it is
    u ∝ P diag(1/g) Σ_p M_p (x_p - β_p) = P diag(1/g) Σ_p M_p γ_p n_p,
times the parents' own std of that token, P the projection that removes the mean over channels.
That makes the branch as linear in its units as the parents' is. g (m,) brings the sum to the scale
of the stream that it is added to; where M chooses channels or averages alike ones, g = M γ moves a
parent exactly. A rotation commutes with a γ only if that is the same for all channels: else g is
its mean over what each target channel is mixed from, and (diag(1/g) M γ - M) times the stream
before is left for the branch, which can give it only in part. Source: fusion.md §3;
docs/decisions/0005.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from slimfuse.fuse import walk
from slimfuse.fuse.running import Running
from slimfuse.fuse.stream import centring
from slimfuse.fuse.union import Union

LEAST_GAIN = 1e-3  # of the gains' root mean square: a channel below carries nothing


class PostNorm:
    """The sums that a post-norm target makes, one norm after the other.

    mixes: (m, d_p) each, w = Σ_p mix_p x_p. norms_stay: the target keeps its own gains and shifts.
    Call `aim`, fit what makes the sum to `missing`, put the sum in place of the stream, `settle`.
    """

    def __init__(
        self, union: Union, run: Running, target: nn.Module, mixes: Sequence[Tensor],
        *, norms_stay: bool,
    ) -> None:  # fmt: skip
        self.union, self.run, self.target, self.mixes = union, run, target, mixes
        self.norms_stay = norms_stay
        self._goals: list[Tensor] = []  # P diag(1/g) M_p
        self._shift = torch.zeros(())  # P diag(1/g) Σ_p M_p β_p
        self._shares: list[float] = []  # of each parent in the std
        self.writes: list[Tensor] = []
        """(m, d_p) each: what a parent's branch gives to the target's sum."""

    def aim(self, path: str, *, means: bool = False) -> None:
        """Take the target's norm at this path as the next one; the parents have landed.

        means: whether what is written keeps its mean over channels, which the norm doesn't see and
        a head that shares the embeddings' table does.
        """
        states = self.union.states
        pairs = list(zip(states, self.run.left, strict=True))
        gains = [state[f"{name}.weight"].double() for state, name in pairs]
        shifts = [state[f"{name}.bias"].double() for state, name in pairs]
        wanted = wanted_gain(self.mixes[0], gains[0])
        shift = _total(m @ b for m, b in zip(self.mixes, shifts, strict=True))
        if self.norms_stay:
            wanted = self.target.get_parameter(f"{path}.weight").double()
            shift = self.target.get_parameter(f"{path}.bias").double()
        turn = centring(len(wanted)) * _inverse(wanted)
        self._goals, self._shift = [turn @ mix for mix in self.mixes], turn @ shift
        energies = [(m * g).square().sum() for m, g in zip(self.mixes, gains, strict=True)]
        self._shares = [float(e / sum(energies)) for e in energies]
        batches = range(len(self.run.sizes))
        real = [self.run.draw.weights(0, b) > 0 for b in batches]
        seen = [
            sum(float(walk.rows(self.run.scale(p, b))[real[b]].sum()) for b in batches)
            for p in range(len(states))
        ]
        seen = self.run.ranks.sum(torch.tensor(seen, dtype=torch.float64)).tolist()
        mean = sum(share * own for share, own in zip(self._shares, seen, strict=True))
        self.writes = [
            (goal * gain) @ centring(len(gain)) * (mean / own)
            for goal, gain, own in zip(self._goals, gains, seen, strict=True)
        ]
        if means:
            level = torch.outer(torch.ones(len(wanted)).double(), _inverse(wanted)) / len(wanted)
            self.writes = [
                write + level @ mix * gain * (mean / own)
                for write, mix, gain, own in zip(self.writes, self.mixes, gains, seen, strict=True)
            ]

    def goal(self, batch: int, places: Tensor) -> Tensor:
        """Return the wanted sums (r, m) of some tokens."""
        pairs = zip(self.run.streams(batch), self._goals, strict=True)
        wanted = _total(walk.rows(x, places) @ goal.T for x, goal in pairs)
        return (wanted - self._shift) * self.scale(batch, places)

    def scale(self, batch: int, places: Tensor) -> Tensor:
        """Return the std (r, 1) that the wanted sums take over: the parents' mean."""
        scales = (walk.rows(self.run.scale(p, batch), places) for p in range(len(self.mixes)))
        return _total(s * share for s, share in zip(scales, self._shares, strict=True))

    def missing(self, batch: int, places: Tensor) -> Tensor:
        """Return what the target's stream lacks (r, m) of the wanted sum, its mean left out."""
        z = walk.rows(self.run.stream(batch), places)
        return self.goal(batch, places) - (z - z.mean(1, keepdim=True))

    def settle(self, path: str, checkpoint: int) -> float:
        """Turn the target's sums into its stream; return the share of w's variance that it misses.

        Each channel's gain and shift are the least-squares ones of w on n(u).
        """
        norm = self.target.get_submodule(path)
        assert isinstance(norm, nn.LayerNorm)
        weight = 0.0
        n_sum = w_sum = nn_sum = nw_sum = ww_sum = torch.zeros((), dtype=torch.float64)
        for b in range(len(self.run.sizes)):
            u = walk.rows(self.run.stream(b))
            n = (u - u.mean(1, keepdim=True)) / walk.norm_scale(norm, u)
            w = self._wanted(b)
            share = self.run.draw.weights(checkpoint, b)
            weight += float(share.sum())
            n_sum, w_sum = n_sum + share @ n, w_sum + share @ w
            nn_sum, nw_sum = nn_sum + share @ n.square(), nw_sum + share @ (n * w)
            ww_sum = ww_sum + share @ w.square()
        every = (torch.tensor(weight, dtype=torch.float64), n_sum, w_sum, nn_sum, nw_sum, ww_sum)
        total, n_sum, w_sum, nn_sum, nw_sum, ww_sum = map(self.run.ranks.sum, every)
        weight = float(total)
        n_mean, w_mean = n_sum / weight, w_sum / weight
        n_var, w_var = nn_sum / weight - n_mean**2, ww_sum / weight - w_mean**2
        cov = nw_sum / weight - n_mean * w_mean
        if self.norms_stay:
            gain, shift = norm.weight.double(), norm.bias.double()
        else:
            gain = torch.where(n_var > 0, cov / n_var.clamp_min(1e-30), 0)
            shift = w_mean - gain * n_mean
            norm.weight.copy_(gain)
            norm.bias.copy_(shift)
        for b in range(len(self.run.sizes)):
            self.run.cache.put("z", b, walk.apply(self.target, path, self.run.stream(b)))
        gap = w_mean - gain * n_mean - shift
        missed = (w_var - 2 * gain * cov + gain**2 * n_var + gap**2).sum()
        return float(missed.clamp_min(0) / w_var.sum().clamp_min(1e-30))

    def _wanted(self, batch: int) -> Tensor:
        pairs = zip(self.run.streams(batch), self.mixes, strict=True)
        return _total(walk.rows(x) @ mix.T for x, mix in pairs)


def wanted_gain(mix: Tensor, gain: Tensor) -> Tensor:
    """Return g (m,): by how much γ (d,) scales what a map (m, d) gives, channel by channel.

    g_i = m_i diag(γ) P m_iᵀ / m_i P m_iᵀ is the least-squares one for a normalised stream whose
    channels vary alike; M γ where M chooses channels or averages alike ones.
    """
    centred = mix @ centring(len(gain))
    return (centred * gain * mix).sum(1) / (centred * mix).sum(1).clamp_min(1e-30)


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)).sum(0)


def _inverse(gain: Tensor) -> Tensor:
    small = gain.abs() < LEAST_GAIN * gain.square().mean().sqrt()
    return torch.where(small, 0, 1 / torch.where(small, 1, gain))
