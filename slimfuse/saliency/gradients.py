"""Gradients of a model, one sample or one micro-batch after the other.

Nothing here knows families: a loss is a callable of the model and a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
BatchLoss = Callable[[nn.Module, T], Tensor]
"""The mean loss of a model on one micro-batch, whose gradient is one sample of the Fisher."""
Batches = Callable[[], Iterable[T]]
"""Gives the same micro-batches each time it is called."""


@dataclass(frozen=True)
class Share(Generic[T]):
    """Every `of`-th of all micro-batches from place `index` on: what one of several processes sees.

    They keep their places among all, so that what is drawn for them doesn't depend on `of`.
    """

    batches: Iterable[T]
    index: int
    of: int

    def numbered(self) -> Iterator[tuple[int, T]]:
        """Yield the micro-batches with their places among all."""
        return islice(enumerate(self.batches), self.index, None, self.of)

    def __iter__(self) -> Iterator[T]:
        """Yield the micro-batches."""
        return (batch for _, batch in self.numbered())


def drawn(logits: Callable[[nn.Module, T], Tensor]) -> BatchLoss[T]:
    """Return the loss against labels that are drawn from the model: the true Fisher's.

    logits: the model's (…, classes) on a micro-batch. Labels come from torch's global generator,
    which `gradients` seeds for every micro-batch: each pass sees the same.
    Source: Martens 2020 (arXiv 1412.1193), section 5.
    """

    def loss(model: nn.Module, batch: T) -> Tensor:
        rows = logits(model, batch)
        rows = rows.reshape(-1, rows.shape[-1])
        labels = torch.multinomial(rows.detach().double().softmax(-1).cpu(), 1)[:, 0]
        return nn.functional.cross_entropy(rows, labels.to(rows.device))

    return loss


def gradients(
    model: nn.Module,
    loss: BatchLoss[T],
    batches: Iterable[T],
    names: Sequence[str],
    *,
    per_sample: bool = False,
    seed: int = 0,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield the gradients (k, *shape) of the named parameters, batch by batch.

    A micro-batch gives one gradient (k = 1), that of its mean loss: for per-sample gradients give
    batches of one. per_sample: one gradient of every sample of a batch by vmap, faster for small
    models; batches must then be trees of tensors with a leading axis of samples, and the loss is
    called with one sample at a time. The model is in evaluation mode meanwhile, its parameters as
    they were afterwards.
    """
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name] for name in names}
    numbered = batches.numbered() if isinstance(batches, Share) else enumerate(batches)
    with _ready(model, wanted):
        for index, batch in numbered:
            with _seeded(seed * 1_000_003 + index):
                if per_sample:
                    found = _vectorised(model, loss, batch, wanted)
                else:
                    with torch.enable_grad():
                        value = loss(model, batch)
                    parts = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
                    found = {
                        name: (torch.zeros_like(p) if g is None else g)[None]
                        for (name, p), g in zip(wanted.items(), parts, strict=True)
                    }
            yield found


def count_rows(batches: Iterable[Any], *, per_sample: bool = False) -> int:
    """Return how many gradients batches will give."""
    from torch.utils._pytree import tree_leaves

    return sum(len(tree_leaves(batch)[0]) if per_sample else 1 for batch in batches)


def _vectorised(
    model: nn.Module, loss: BatchLoss[T], batch: T, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._pytree import tree_map

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, one: Any) -> Tensor:
            return loss(self.model, one)

    asked = Asked()
    named = {f"model.{name}": p.detach() for name, p in wanted.items()}

    def of_one(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        one = tree_map(lambda t: t[None], sample)
        value: Tensor = torch.func.functional_call(asked, parameters, (one,))
        return value

    # of the kernels of attention only this one has a batching rule on a CPU; without no_grad the
    # gradients would hang on the parameters that aren't asked for
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        found = torch.func.vmap(torch.func.grad(of_one), (None, 0), randomness="different")(
            named, batch
        )
    return {name.removeprefix("model."): g for name, g in found.items()}


@contextmanager
def _ready(model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    frozen = [p for p in wanted.values() if not p.requires_grad]
    model.eval()
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, was in training.items():
            module.training = was


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
