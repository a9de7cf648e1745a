"""What a change of the weights does to the answers, forecast by one derivative along it.

With δ the change, z the answers and J their Jacobian, the loss rises by g·δ + ½ δᵀGδ and the
answers part by KL ≈ ½ δᵀGδ, G = Jᵀ H J the generalised Gauss-Newton matrix: one forward-mode pass
gives Jδ, and no matrix is made. Where δ = α |w| ⊙ ξ is noise, the mean of ½ δᵀGδ is ½ α² Σ w² G_ii.
Source: arXiv 2307.04719; diagnostics.md §3, §4.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimfuse.batch import Batch, call
from slimfuse.diagnose.answers import (
    Kind,
    Labelled,
    Read,
    curved,
    divergences,
    flat,
    losses,
    slopes,
)

Change = Mapping[str, Tensor]
"""What is added to parameters, by their names."""


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its standard error; samples: how many rows it rests on."""

    value: float
    error: float
    samples: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Return the mean of independent values (n,)."""
        n = len(values)
        spread = float(values.double().std()) if n > 1 else float("nan")
        return cls(float(values.double().mean()), spread / sqrt(n), n)


@dataclass(frozen=True)
class Forecast:
    """What a change is expected to do: g·δ, ½ δᵀGδ and their sum, each a mean over rows."""

    linear: Estimate
    quadratic: Estimate
    total: Estimate


def along(
    model: nn.Module, given: Labelled, change: Change, read: Read = flat
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the answers (rows, m), their derivative along a change of the weights, and goals."""
    parameters, goals = dict(model.named_parameters()), list[Tensor | None]()
    at = {name: parameters[name].detach() for name in change}
    moved = {name: value.to(at[name]) for name, value in change.items()}

    def answers(weights: dict[str, Tensor]) -> Tensor:
        rows, wanted = answered(model, given, read, weights)
        goals.append(wanted)
        return rows

    # of the kernels of attention only this one has a forward derivative on a CPU
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), warnings.catch_warnings():
        # torch's own rules of forward mode are compiled so on first use
        warnings.filterwarnings("ignore", ".*torch.jit.* is deprecated", DeprecationWarning)
        rows, tangents, *_ = torch.func.jvp(answers, (at,), (moved,))
    return rows.detach(), tangents.detach(), goals[-1]


def answered(
    model: nn.Module, given: Labelled, read: Read, weights: Change | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return a model's rows that count and their goals; weights: in the place of its own."""
    inputs, labels = given
    like = next(model.parameters())
    ready = inputs.to(like.device, like.dtype)
    labels = None if labels is None else labels.to(like.device)
    if weights is None:
        return read(call(model, ready), ready, labels)
    own = (dict(weights), (), dict(ready.arguments)) if isinstance(ready, Batch) else (
        dict(weights), (ready,), {})  # fmt: skip
    return read(torch.func.functional_call(model, *own), ready, labels)


def forecast(
    model: nn.Module,
    batches: Iterable[Labelled],
    change: Change,
    kind: Kind,
    read: Read = flat,
) -> Forecast:
    """Return what a change of the weights is expected to do to the loss of some samples.

    Without goals those are the model's own answers, and g = 0. Take samples that the model was not
    trained on. Cost: three forward passes.
    """
    firsts, seconds = [], []
    for given in batches:
        rows, tangents, goals = along(model, given, change, read)
        rows, tangents = rows.double(), tangents.double()
        seconds.append((tangents * curved(kind, rows, tangents)).sum(1) / 2)
        slope = torch.zeros_like(rows) if goals is None else slopes(kind, rows, goals)
        firsts.append((slope * tangents).sum(1))
    first, second = torch.cat(firsts), torch.cat(seconds)
    return Forecast(Estimate.of(first), Estimate.of(second), Estimate.of(first + second))


@torch.no_grad()
def measured(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[Labelled],
    kind: Kind,
    read: Read = flat,
) -> tuple[Estimate, Estimate, float]:
    """Return how the loss rose, KL(before ‖ after), and the largest change of an answer.

    batches: as for `forecast`; without goals the rise is the divergence.
    """
    rises, apart, most = [], [], 0.0
    for given in batches:
        old, goals = answered(before, given, read)
        new, _ = answered(after, given, read)
        if len(old):
            most = max(most, float((old - new).abs().max()))
        gap = divergences(kind, old, new)
        apart.append(gap)
        rise = gap
        if goals is not None:
            rise = losses(kind, new.double(), goals) - losses(kind, old.double(), goals)
        rises.append(rise)
    return Estimate.of(torch.cat(rises)), Estimate.of(torch.cat(apart)), most


def difference(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Return what was added to every parameter that moved."""
    first = dict(before.named_parameters())
    gaps = {name: (p - first[name]).detach() for name, p in after.named_parameters()}
    return {name: gap for name, gap in gaps.items() if bool(gap.any())}


def scalar_curvature(slope: Tensor, hessian: Tensor) -> float:
    """Return the scalar curvature of a loss' graph, from its slope g (n,) and Hessian (n, n).

    S = β[(tr H)² - tr H²] + 2β²[gᵀH²g - tr(H) gᵀHg], β = 1/(1 + |g|²); at a minimum
    ‖H‖_F²(PR - 1), PR = (tr H)²/tr H². It is not invariant to a rescaling of the weights.
    """
    g, h = slope.double(), hessian.double()
    beta = 1 / (1 + g @ g)
    trace, moved = h.trace(), h @ g
    flat_part = trace**2 - (h * h).sum()
    return float(beta * flat_part + 2 * beta**2 * (moved @ moved - trace * (g @ moved)))
