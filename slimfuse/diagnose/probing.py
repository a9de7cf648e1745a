"""Random probes of the answers' information: gradients whose mean square is the Gauss-Newton.

With S Sᵀ = H of each row's loss and noise ξ, g = Jᵀ S ξ has E g gᵀ = Jᵀ H J = G: one backward pass
for each probe, no labels, no matrix. Source: Martens 2020 (arXiv 1412.1193), §5, with signs in the
place of drawn labels (Hutchinson).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from slimfuse.diagnose.answers import Kind, Labelled, Read, flat, rooted
from slimfuse.diagnose.curvature import answered

T = TypeVar("T")
LEAST = 2  # of anything, or there is no standard error


@dataclass
class Patience:
    """How long work may go on. seconds: from its making; None: without an end."""

    seconds: float | None = None
    begun: float = field(default_factory=time.monotonic)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items until the time is over, but the first two in any case."""
        for place, item in enumerate(items):
            if place >= LEAST and self.gone:
                return
            yield item

    @property
    def gone(self) -> bool:
        """Whether the time is over."""
        return self.seconds is not None and time.monotonic() - self.begun >= self.seconds


@contextmanager
def only(model: nn.Module, wanted: Sequence[Tensor] = ()) -> Iterator[None]:
    """Let no parameter but the wanted ones ask for gradients.

    A pass' graph then keeps no layer's inputs for the gradients of weights that nobody asks for.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    asked = {id(parameter) for parameter in wanted}
    for parameter in flags:
        parameter.requires_grad_(id(parameter) in asked)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def probe(
    model: nn.Module,
    given: Labelled,
    kind: Kind,
    generator: torch.Generator,
    read: Read = flat,
) -> Tensor:
    """Return Σ rows · stop(S ξ), whose gradient is Jᵀ S ξ; ξ are random signs."""
    rows, _ = answered(model, given, read)
    noise = torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1
    weights = rooted(kind, rows.detach().double(), noise.to(rows.device).double())
    return (rows * weights.to(rows)).sum()
