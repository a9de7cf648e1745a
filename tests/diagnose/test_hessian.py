"""Integer rank formulas against dense matrices in float64, with a gap in the spectrum."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfuse.diagnose.hessian import (
    Sizes,
    deep_linear,
    linear_cnn,
    rank_with_gap,
    symmetries,
)

# torch's own rules of forward mode are compiled on first use
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

GAP = 1e3  # below it the rank would be a matter of opinion


def rank(matrix: Tensor) -> int:
    found, gap = rank_with_gap(matrix)
    assert gap > GAP, f"no gap: {gap:.1e}"
    return found


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(answers: Any, weights: list[Tensor], goals: Tensor) -> tuple[Tensor, Tensor]:
    """Return H_o and H_f of half the squared error over flattened weights."""
    sizes, shapes = [w.numel() for w in weights], [w.shape for w in weights]

    def at(flat: Tensor) -> Tensor:
        pieces = [p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        found: Tensor = answers(pieces).flatten()
        return found

    flat = torch.cat([w.flatten() for w in weights])
    jacobian = torch.func.jacrev(at)(flat)
    whole = torch.func.hessian(lambda f: (at(f) - goals.flatten()).square().sum() / 2)(flat)
    outer = jacobian.T @ jacobian
    return outer, whole - outer


@pytest.mark.parametrize(
    ("widths", "r"),
    [((5, 4, 3), 5), ((4, 6, 3), 4), ((5, 2, 4), 5), ((4, 3, 3, 2), 4), ((5, 4, 4), 3),
     ((3, 5, 4, 6), 3), ((4, 2, 5, 3), 4), ((3, 4, 2, 3, 4), 3)],
)  # fmt: skip
def test_deep_linear_nets(widths: tuple[int, ...], r: int) -> None:
    weights = [normal(b, a, seed=i) for i, (a, b) in enumerate(pairwise(widths))]
    x = normal(r, widths[0], seed=50).T @ normal(r, 40, seed=51)  # (inputs, samples) of rank r

    def answers(ws: list[Tensor]) -> Tensor:
        found = x
        for w in ws:
            found = w @ found
        return found

    outer, functional = parts(answers, weights, normal(widths[-1], 40, seed=52))
    want = deep_linear(widths, r)
    assert (rank(outer), rank(functional), rank(outer + functional)) == (
        want.outer, want.functional, want.whole,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("filters", "kernels"),
    [((2, 3, 2), (3, 2)), ((1, 4, 3), (2, 3)), ((3, 2, 2), (2, 2)), ((2, 1, 3), (3, 3))],
)
def test_linear_cnns(filters: tuple[int, int, int], kernels: tuple[int, int]) -> None:
    (m0, m, m2), (k1, k2) = filters, kernels
    x = normal(60, m0, k1 + k2 + 2, seed=3)
    weights = [normal(m, m0, k1, seed=4), normal(m2, m, k2, seed=5)]

    def answers(ws: list[Tensor]) -> Tensor:
        return nn.functional.conv1d(nn.functional.conv1d(x, ws[0]), ws[1])

    outer, functional = parts(answers, weights, normal(60, m2, 4, seed=6))
    want = linear_cnn(filters, kernels)
    assert (rank(outer), rank(functional)) == (want.outer, want.functional)


def test_the_rank_grows_as_the_root_of_the_parameters() -> None:
    """Twice the filters, four times the parameters, about twice the rank."""
    ranks, counts = [], []
    for m in (4, 8, 16, 32):
        found = linear_cnn((1, m, m), (3, 3))
        ranks.append(found.outer)
        counts.append(m * (3 + 3 * m))
    slopes = [
        (torch.tensor(b / a).log2() / torch.tensor(d / c).log2()).item()
        for a, b, c, d in zip(ranks, ranks[1:], counts, counts[1:], strict=False)
    ]
    assert all(0.4 < s < 0.6 for s in slopes)


# -- transformers --------------------------------------------------------------------------


def norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt() * gain + bias


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt() * gain


def turned(x: Tensor) -> Tensor:
    """Rotary positions on (batch, heads, tokens, head)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.7 ** torch.arange(half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Net:
    """A transformer of the sizes, whose parameters are drawn one after the other."""

    def __init__(self, kind: str, s: Sizes) -> None:
        self.kind, self.s, self.parameters, self.place = kind, s, [], 0
        self.drawing = True
        self(normal(1, 3, s.inputs, seed=0), [])
        self.drawing = False

    def take(self, *shape: int, gain: bool = False) -> Tensor:
        if self.drawing:
            drawn = normal(*shape, seed=100 + len(self.parameters)) * (
                0.3 if gain else shape[-1] ** -0.5
            )
            self.parameters.append(drawn + 1 if gain else drawn)
        self.place += 1
        return (self.parameters if self.drawing else self.given)[self.place - 1]

    def linear(self, x: Tensor, out: int) -> Tensor:
        found = x @ self.take(out, x.shape[-1]).T
        return found if self.kind == "rms" else found + self.take(out)

    def normed(self, x: Tensor) -> Tensor:
        d = self.s.stream
        gain = self.take(d, gain=True)
        return rms(x, gain) if self.kind == "rms" else norm(x, gain, self.take(d))

    def attention(self, x: Tensor) -> Tensor:
        s, b, t = self.s, len(x), x.shape[1]
        keys = s.kv or s.heads
        q, k, v = (
            self.linear(x, n * s.head).view(b, t, n, s.head).transpose(1, 2)
            for n in (s.heads, keys, keys)
        )
        if s.rope:
            q, k = turned(q), turned(k)
        k, v = (z.repeat_interleave(s.heads // keys, 1) for z in (k, v))
        scores = (q @ k.transpose(2, 3) / s.head**0.5).softmax(-1)
        return self.linear((scores @ v).transpose(1, 2).reshape(b, t, -1), s.stream)

    def mlp(self, x: Tensor) -> Tensor:
        act = nn.functional.silu if self.kind == "rms" else nn.functional.gelu
        found = act(self.linear(x, self.s.hidden))
        if self.kind == "rms":
            found = found * self.linear(x, self.s.hidden)
        return self.linear(found, self.s.stream)

    def __call__(self, x: Tensor, given: list[Tensor]) -> Tensor:
        self.given, self.place = given, 0
        post = self.kind == "post-norm"
        z = self.linear(x, self.s.stream)
        if post:
            z = self.normed(z)
        for _ in range(self.s.layers):
            z = self.normed(z + self.attention(z)) if post else z + self.attention(self.normed(z))
            z = self.normed(z + self.mlp(z)) if post else z + self.mlp(self.normed(z))
        if not post:
            z = self.normed(z)
        return self.linear(z[:, 0], self.s.outputs)


# as many inputs as the stream is wide, else its first layer would read a part of it only
CASES = [
    ("pre-norm", Sizes(5, 5, 1, 2, 3, 1, 2)),
    ("pre-norm", Sizes(7, 6, 2, 2, 4, 1, 3)),
    ("pre-norm", Sizes(5, 4, 2, 1, 3, 2, 2)),
    ("post-norm", Sizes(5, 5, 1, 2, 3, 1, 2)),
    ("post-norm", Sizes(7, 6, 2, 2, 4, 1, 3)),
    ("post-norm", Sizes(5, 4, 2, 1, 3, 2, 2)),
    ("rms", Sizes(5, 5, 2, 2, 4, 1, 2, kv=1, rope=True)),
    ("rms", Sizes(7, 6, 2, 2, 4, 1, 3, kv=2, rope=False)),
    ("rms", Sizes(4, 4, 2, 2, 3, 2, 2, kv=1, rope=True)),
]


@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_transformers(kind: Any, sizes: Sizes) -> None:
    net = Net(kind, sizes)
    weights = list(net.parameters)
    counts, shapes = [w.numel() for w in weights], [w.shape for w in weights]
    total = sum(counts)
    flat = torch.cat([w.flatten() for w in weights])
    x = normal(2 * total // sizes.outputs + 20, 4, sizes.inputs, seed=9)

    def at(given: Tensor) -> Tensor:
        pieces = [p.view(s) for p, s in zip(given.split(counts), shapes, strict=True)]
        return net(x, pieces).flatten()

    jacobian = torch.func.jacfwd(at)(flat)
    assert rank(jacobian) == total - symmetries(kind, sizes)


def test_a_rank_without_a_gap_is_seen() -> None:
    falling = torch.diag(10.0 ** -torch.arange(12, dtype=torch.float64))
    assert rank_with_gap(falling)[1] < GAP
    assert rank_with_gap(torch.eye(3))[0] == 3 and rank_with_gap(torch.zeros(2, 2))[0] == 0
