"""Which tensors must stay in float: what rounding each of them does to the answers.

KL ≈ ½ δᵀGδ by probes of G: a forecast of the mixed-precision list without labels and without a
quantised model. Source: arXiv 2307.04719; diagnostics.md §4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimfuse.diagnose.answers import Kind, Labelled, Read, flat
from slimfuse.diagnose.curvature import Change, Estimate
from slimfuse.diagnose.probing import Patience, probe


@dataclass(frozen=True)
class TensorForecast:
    """KL that a change of one tensor is expected to cost, in nats a sample, by its name."""

    tensor: str
    costs: Mapping[str, Estimate]
    numbers: int


def by_tensor(
    model: nn.Module,
    singles: Iterable[Labelled],
    changes: Mapping[str, Change],
    kind: Kind,
    read: Read = flat,
    *,
    probes: int = 1,
    seed: int = 0,
    patience: Patience | None = None,
) -> tuple[list[TensorForecast], dict[str, Estimate]]:
    """Return ½ δᵀGδ of every tensor alone and of all together, for several changes at once.

    singles: samples one by one; changes: by what is to be done, of parameters by name. Each probe
    g = JᵀSξ of a sample gives (g·δ)² for all of them: one backward pass whatever their number.
    Labels aren't looked at. Take samples that the model was not trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(dict.fromkeys(name for change in changes.values() for name in change))
    parameters = dict(model.named_parameters())
    asked = [parameters[name] for name in names]
    products: dict[str, list[Tensor]] = {what: [] for what in changes}
    for given in (patience or Patience()).over(singles):
        for _ in range(probes):
            with torch.enable_grad():
                value = probe(model, given, kind, generator, read)
                slopes = torch.autograd.grad(value, asked, allow_unused=True)
            for what, change in changes.items():
                row = [
                    0.0 if g is None or name not in change
                    else float((g.double() * change[name].to(g)).sum())
                    for name, g in zip(names, slopes, strict=True)
                ]  # fmt: skip
                products[what].append(torch.tensor(row, dtype=torch.float64))
    found = {what: torch.stack(rows) for what, rows in products.items()}
    tensors = [
        TensorForecast(
            name,
            {what: Estimate.of(rows[:, i].square() / 2) for what, rows in found.items()},
            parameters[name].numel(),
        )
        for i, name in enumerate(names)
    ]
    return tensors, {what: Estimate.of(rows.sum(1).square() / 2) for what, rows in found.items()}


def rounding(weight: Tensor, bits: int, block: int | None = None) -> Tensor:
    """Return what rounding a weight (out, in) to so many bits adds to it.

    Symmetric, with a scale for every output, or for every `block` of its inputs.
    """
    rows = weight.detach().double()
    parts = [rows] if block is None else list(rows.split(block, 1))
    found = []
    for part in parts:
        scale = part.abs().amax(1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
        found.append((part / scale).round() * scale)
    return (torch.cat(found, 1) - rows).to(weight.dtype)


def in_float(
    found: Sequence[TensorForecast], what: str, allowed: float
) -> tuple[tuple[str, ...], float]:
    """Return the tensors to leave as they are so that the rest costs at most `allowed` nats.

    The dearest by what they cost a number go first. Also returns what the others cost together,
    cross terms left out.
    """
    left = {one.tensor: one.costs[what].value for one in found}
    order = sorted(found, key=lambda one: -one.costs[what].value / one.numbers)
    kept: list[str] = []
    for one in order:
        if sum(left.values()) <= allowed:
            break
        kept.append(one.tensor)
        del left[one.tensor]
    return tuple(kept), sum(left.values())
