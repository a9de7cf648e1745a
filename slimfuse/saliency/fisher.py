"""Sums of gradients: the block Grams (1/m) Σ g gᵀ, streamed in passes.

A pass takes as many blocks as its memory holds, so that m × d gradients never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from slimfuse.errors import SlimfuseError
from slimfuse.progress import track
from slimfuse.saliency.gradients import Batches, BatchLoss, gradients
from slimfuse.saliency.inverse import (
    BlockInverse,
    DiagonalInverse,
    GramInverse,
    Route,
    SampleInverse,
    cut_rows,
)
from slimfuse.saliency.patterns import UNSTRUCTURED, Layer, Pattern

T = TypeVar("T")
R = TypeVar("R")
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes, as an all-reduce does; it may do so in place."""

MEMORY = 2 << 30
HELD = 32  # gradients that wait for one product: a Gram is read and written once for all of them
CACHE = 1 << 18  # numbers that one step of the linear algebra works on: they stay in the cache
SERIAL = 1 << 15  # from here on torch would split a step's elementwise work among threads itself


def agreed(value: int, reduce: Reduce) -> bool:
    """Say whether all processes have one value (from 0, below 2³²); all get the same answer."""
    count, total = reduce(torch.tensor([1, value], dtype=torch.float64)).tolist()
    alike = torch.tensor([total == count * value], dtype=torch.float64)  # of ranks at the mean
    return bool(reduce(alike) == count)


def sweep(
    visit: Callable[[slice], R], blocks: int, numbers: int, device: torch.device | None = None
) -> list[R]:
    """Return what a function makes of a few blocks at a time, in order.

    numbers: of one block. Small blocks are shared among torch's threads, which a batch of LAPACK
    calls is not by itself.
    """
    threads = torch.get_num_threads() if device is None or device.type == "cpu" else 1
    if numbers > SERIAL:
        threads = 1  # a large factor uses the threads itself
    step = max(1, (SERIAL if threads > 1 else CACHE) // numbers)
    places = [slice(start, min(start + step, blocks)) for start in range(0, blocks, step)]
    if threads == 1 or len(places) == 1:
        return [visit(where) for where in places]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(visit, places))


@dataclass(frozen=True)
class Part:
    """Blocks `start` to `stop` of a layer's flat weights, `block` weights each."""

    layer: Layer
    block: int
    start: int
    stop: int

    @property
    def weights(self) -> slice:
        """Where the part's weights lie in the flat layer."""
        return slice(self.start * self.block, min(self.stop * self.block, self.layer.size))

    @property
    def key(self) -> str:
        """A name of its own."""
        return f"{self.layer.name}:{self.start}"


def plan(
    layers: Sequence[Layer], block: int, samples: int, route: Route, *, memory: int, itemsize: int
) -> list[list[Part]]:
    """Return what each pass over the gradients takes: parts of layers within `memory` bytes.

    A block of B weights needs (B² + 32 B) numbers by Grams, m·B by samples, B alone; a layer that
    doesn't fit is cut. Every pass costs a forward and a backward of all m.
    """
    passes: list[list[Part]] = [[]]
    left = memory
    for layer in layers:
        width = min(block, layer.size)
        numbers = {"gram": width * (width + HELD), "diagonal": 2 * width}.get(
            route, samples * width
        )
        each, blocks, start = numbers * itemsize, -(-layer.size // width), 0
        while start < blocks:
            count = min(blocks - start, left // each)
            if count == 0 and passes[-1]:
                passes.append([])
                left = memory
                continue
            stop = start + max(count, 1)
            passes[-1].append(Part(layer, width, start, stop))
            left, start = left - (stop - start) * each, stop
    return passes


class Sums:
    """What a part's blocks need of the gradients: Grams, or the gradients themselves (m < B).

    Plain sums over gradients, so that `reduce` joins those of several processes; samples aren't
    summed, and need the Gram route there. first: also Σ g, for WoodTaylor. mean_diagonal, after
    `finish`: the mean of g² over gradients and all the layer's weights.
    """

    mean_diagonal: float

    def __init__(self, part: Part, route: Route, *, first: bool = False) -> None:
        assert route in ("gram", "samples", "diagonal"), route
        self.part, self.route, self.first = part, route, first
        self.count = 0
        self._whole = part.weights == slice(0, part.layer.size)
        self._held: list[Tensor] = []
        self._gram: Tensor | None = None
        self._total: Tensor | None = None
        self._squares = 0.0

    def add(self, rows: Tensor) -> None:
        """Add gradients (k, d) of the whole layer, flat in the pattern's order."""
        if not rows.dtype.is_floating_point or rows.dtype.itemsize < 4:
            rows = rows.float()
        if not self._whole:  # the layer's mean diagonal is needed, of which this is a part
            norm = torch.linalg.vector_norm(rows, dtype=torch.float64)
            self._squares += float(norm) ** 2
            rows = rows[:, self.part.weights].clone()  # a view would keep the whole alive
        self.count += len(rows)
        if self.first:
            total = rows.sum(0, dtype=torch.float64)
            self._total = total if self._total is None else self._total.add_(total)
        if self.route == "diagonal":
            square = rows.square().sum(0, dtype=torch.float64)
            self._gram = square if self._gram is None else self._gram.add_(square)
            return
        self._held.append(rows)
        if self.route == "gram" and sum(map(len, self._held)) >= HELD:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        block, blocks = self.part.block, self.part.stop - self.part.start
        if self._gram is None:
            self._gram = self._held[0].new_zeros(blocks, block, block)
        step = max(1, 2 * CACHE // (block * max(1, sum(map(len, self._held)))))
        for start in range(0, blocks, step):
            cut = self._cut(slice(start, start + step))
            self._gram[start : start + step].baddbmm_(cut.mT, cut)
        self._held = []

    def _cut(self, blocks: slice) -> Tensor:
        """Return the held gradients of some blocks, (n, m, B)."""
        width = self.part.block
        where = slice(blocks.start * width, blocks.stop * width)
        return cut_rows(torch.cat([rows[:, where] for rows in self._held]), width)

    def finish(self, reduce: Reduce | None = None) -> None:
        """Close the sums, over all processes where `reduce` is given.

        Raises SlimfuseError when there was no gradient, or one that isn't finite.
        """
        if self.route == "gram":
            self._flush()
        if reduce is not None:
            assert self.route != "samples", "gradients of several processes aren't summed"
            counts = reduce(torch.tensor([self.count, self._squares], dtype=torch.float64))
            self.count, self._squares = round(float(counts[0])), float(counts[1])
            self._gram = None if self._gram is None else reduce(self._gram)
            self._total = None if self._total is None else reduce(self._total)
        if not self.count:
            raise SlimfuseError("there is no gradient to estimate the Fisher from")
        self.mean_diagonal = self._sum_of_squares() / (self.count * self.part.layer.size)
        _check_finite(self.part.layer.name, self.mean_diagonal)

    def _sum_of_squares(self) -> float:
        if not self._whole:
            return self._squares
        if self.route == "samples":
            norms = [torch.linalg.vector_norm(r, dtype=torch.float64) for r in self._held]
            return float(torch.stack(norms).square().sum())
        assert self._gram is not None
        diagonal = self._gram if self._gram.ndim == 1 else self._gram.diagonal(dim1=1, dim2=2)
        return float(diagonal.sum(dtype=torch.float64))

    def mean_gradient(self) -> Tensor:
        """Return ḡ, the mean gradient of the part's weights, float64."""
        assert self._total is not None, "made without first=True"
        return self._total / self.count

    def inverse(self, blocks: slice, damping: float) -> BlockInverse:
        """Return the inverse of some of the part's blocks, counted from its first; float64."""
        if self.route == "samples":
            return SampleInverse(self._cut(blocks).double(), damping)
        assert self._gram is not None
        if self.route == "diagonal":
            width = self.part.block
            found = self._gram[blocks.start * width : blocks.stop * width] / self.count
            return DiagonalInverse(cut_rows(found[None], width)[:, 0], damping)
        mean = self._gram[blocks].to(torch.float64, copy=True).div_(self.count)
        return GramInverse(mean, damping)


def accumulate(
    model: nn.Module,
    loss: BatchLoss[T],
    batches: Iterable[T],
    parts: Sequence[Part],
    route: Route,
    *,
    samples: int = 0,
    pattern: Pattern = UNSTRUCTURED,
    first: bool = False,
    per_sample: bool = False,
    seed: int = 0,
    reduce: Reduce | None = None,
    what: str = "gradients",
) -> dict[str, Sums]:
    """Return the sums of parts, by their keys, after one pass over the batches.

    samples: how many gradients there will be, for the bar. See `gradients` and `Sums`.
    """
    sums = {part.key: Sums(part, route, first=first) for part in parts}
    layers = {part.layer.name: part.layer for part in parts}
    stream = gradients(model, loss, batches, list(layers), per_sample=per_sample, seed=seed)
    with track(what, samples) as tell, closing(stream):
        done = 0
        for found in stream:
            for name, layer in layers.items():
                rows = pattern.flat(layer, found.pop(name))
                done += len(rows) * (name == next(iter(layers)))
                for own in sums.values():
                    if own.part.layer == layer:
                        own.add(rows)
            tell(done)
    parameters = dict(model.named_parameters())
    for own in sums.values():
        if reduce is not None:  # a process that saw no batch adds noughts
            layer = own.part.layer
            own.add(parameters[layer.name].new_zeros(0, layer.size))
        own.finish(reduce)
    return sums


def mean_square(
    model: nn.Module,
    loss: BatchLoss[T],
    batches: Batches[T],
    layers: Sequence[Layer],
    sums: Iterable[Sums],
    *,
    per_sample: bool = False,
    seed: int = 0,
    reduce: Reduce | None = None,
) -> float:
    """Return the mean of g² over gradients and all weights of `layers`.

    sums: of some parts, finished; layers that have none are seen in a pass of their own.
    """
    known = {own.part.layer.name: own.mean_diagonal for own in sums}
    left = [layer for layer in layers if layer.name not in known]
    if left:
        totals = torch.zeros(len(left), dtype=torch.float64)
        count = torch.zeros(1, dtype=torch.float64)
        names = [layer.name for layer in left]
        stream = gradients(model, loss, batches(), names, per_sample=per_sample, seed=seed)
        with closing(stream):
            for found in stream:
                count += len(found[names[0]])
                norms = [torch.linalg.vector_norm(found[n], dtype=torch.float64) for n in names]
                totals += torch.stack(norms).cpu().square()
        if reduce is not None:
            totals, count = reduce(totals), reduce(count)
        means = (totals / count).tolist()
        known |= {la.name: mean / la.size for la, mean in zip(left, means, strict=True)}
        for name in names:
            _check_finite(name, known[name])
    return sum(known[la.name] * la.size for la in layers) / sum(la.size for la in layers)


def _check_finite(name: str, mean: float) -> None:
    if not math.isfinite(mean):
        raise SlimfuseError(
            f"a gradient of {name} is not finite",
            hint="check the loss on these batches, or compute in float32",
        )
