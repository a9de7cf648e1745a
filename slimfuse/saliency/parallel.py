"""Saliency in several processes: each sees its share of the batches, sums are all-reduced.

What every Fisher here is made of are plain sums over gradients: block Grams, diagonals, first
moments, mean squares, and m itself. All processes then hold the same sums, so that they make the
same inverses, thresholds, masks and updates, each for itself. A script calls

    ranks = Processes(Accelerator())
    sparsify(model, loss, ranks.share(batches), spec, reduce=ranks.sum, main=ranks.main)

with the same model, the same batches and as many threads in every process, and is started by

    torchrun --nproc-per-node 4 prune.py

on graphics cards or, with `Accelerator(cpu=True)`, on processors (gloo); on several cards also by
`accelerate launch --multi_gpu --num_processes 4 prune.py` (`accelerate launch --cpu` needs MPI to
start more than one).

`weight_scores` and `accumulate` take `reduce`, and so does the `Subject` of the structured scorers
"mask-fisher" and "taylor"; give a loss that draws another seed in each process. Checkpoints are
written by the main process and read by all: give all of them one path; where they don't read the
same file the work starts over. Training between two steps has to end with the same weights
everywhere; that all decided alike is checked after every step. `slimfuse compress` does all this by
itself in several processes, see docs/distributed.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from slimfuse.saliency.gradients import Batches, Share

T = TypeVar("T")
PIECE = 1 << 24  # numbers: accelerate reduces a copy


@dataclass(frozen=True)
class Processes:
    """The processes of an `Accelerator`: this one's share of the batches, and sums over all.

    Without one it is a single process, whose share is all and whose sums are its own.
    """

    accelerator: Accelerator | None = None

    @property
    def index(self) -> int:
        """Which process this is, counted from 0."""
        return 0 if self.accelerator is None else int(self.accelerator.process_index)

    @property
    def of(self) -> int:
        """How many there are."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.index == 0

    def share(self, batches: Batches[T]) -> Batches[T]:
        """Return the batches that this process sees: of n processes every n-th, counted in turn.

        Shares differ by one batch at most, and may be empty. Batches keep their places among all,
        by which `gradients.drawn` draws labels: they are those that one process would draw.
        """

        def own() -> Iterable[T]:
            return Share(batches(), self.index, self.of)

        return own

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor summed over all processes, in place; alone it is left as it is.

        Every process has to call it equally often, with tensors of one shape and dtype.
        """
        if self.accelerator is None or self.of == 1:
            return tensor
        for piece in tensor.view(-1).split(PIECE):
            piece.copy_(self.accelerator.reduce(piece.to(self.accelerator.device), "sum"))
        return tensor

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, one process's after another's."""
        return items if self.of == 1 else list(gather_object(items))
