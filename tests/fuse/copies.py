"""Widened and permuted copies of a model, and their fusion by transport."""

from __future__ import annotations

from typing import Any

from tiny import duplicate, images, logits, maps_of, moved, permute
from torch import Tensor, nn

from slimfuse.families import ViT
from slimfuse.fuse.transport import TransportFusion, TransportSettings, fuse_by_transport
from slimfuse.fuse.union import Parent

FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-14
WRONG = 1e-2  # another function than the anchor's; measured values are above 0.05
ALGEBRA = {"rtol": 0, "atol": 1e-12}  # float64, exact identities of numbers of order 1
EVERY = ("resid", "head", "qk", "vo", "mlp")
SPACES = {"resid": ("resid",), "head": ("head",), "qk": ("qk", "vo"), "mlp": ("mlp",), "all": EVERY}
GROWN: dict[str, dict[str, int]] = {
    "resid": {"hidden_size": 30, "head_dim": 5},
    "head": {"num_attention_heads": 6, "head_dim": 5},
    "qk": {"head_dim": 10},
    "mlp": {"intermediate_size": 34},
    "all": {
        "hidden_size": 30, "num_attention_heads": 6, "head_dim": 10, "intermediate_size": 34,
    },
}  # fmt: skip
RESIDUALS = ("none", "residual-only", "mean", "weighted-scalar", "weighted-matrix")
QKS = ("separate", "joint", "equal")
HEADS = ("kept", "crossed")


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def widened(model: nn.Module, space: str = "all") -> nn.Module:
    maps = maps_of(model, SPACES[space], lambda n, _seed: duplicate(n))
    return moved(model, maps, **GROWN[space])


def permuted(model: nn.Module, spaces: tuple[str, ...] = EVERY, seed: int = 0) -> nn.Module:
    return moved(model, maps_of(model, spaces, lambda n, s: permute(n, s + seed)))


def fused(
    parents: list[nn.Module], anchor: nn.Module, n: int = 48, **settings: Any
) -> tuple[nn.Module, TransportFusion]:
    target = ViT().build(anchor.config).double()
    x = images(n, seed=7)
    result = fuse_by_transport(
        [Parent(f"p{i}", m) for i, m in enumerate(parents)],
        anchor,
        target,
        ViT(),
        lambda: x.split(16),
        TransportSettings(**{"anchor_weight": 0.0, **settings}),
        n_batches=n // 16,
    )
    return target, result


def error(parents: list[nn.Module], anchor: nn.Module, **settings: Any) -> float:
    x = images(9)
    return gap(logits(fused(parents, anchor, **settings)[0], x), logits(anchor, x))
