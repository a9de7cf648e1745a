"""What parents teach of every training sample, asked for once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimfuse.batch import Batch, token_mask
from slimfuse.finetune.hidden import Hidden
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.held_out import by_length
from slimfuse.pipeline.job import Job
from slimfuse.progress import track
from slimfuse.store import Stage, digest
from slimfuse.tasks import Samples

if TYPE_CHECKING:
    from slimfuse.pipeline.stages import BaseStages

LIMIT = 4 << 30  # bytes on disk that streams may take
SHARD = 512  # samples a file
OPEN = 512  # files at most
KEPT = torch.bfloat16  # 8 bits of each number: goals are met to a few per cent at best

Goals = Callable[[Tensor, Batch], tuple[Tensor, ...]]
"""Sample indices and inputs -> the goals of every block (batch, tokens, m)."""


def size(job: BaseJob) -> int:
    """Return the bytes that the goals of all training samples take."""
    if not isinstance(job, Job):
        return 0
    shape = job.family.shape(job.target)
    rows = job.count("train") * job.opened.tokens(job.target)
    return rows * shape.num_hidden_layers * shape.hidden_size * KEPT.itemsize


def kept(stages: BaseStages, hidden: Hidden, samples: Samples, ask: Goals) -> Goals:
    """Return goals that are read from a stage, which is made of what `ask` says if need be."""
    task, parents = stages.job.task, {p.name: p for p in stages.job.parents}
    inputs: dict[str, Any] = stages.base | {
        "maps": digest([[s.name, s.depths, s.mix.tolist()] for s in hidden.sources]),
        "parents": [stages.parent(parents[s.name])[1] for s in hidden.sources],
        "precision": stages.job.precision,
    }

    def build(folder: Path) -> None:
        done = 0
        with track("asking the parents for hidden states", len(samples)) as tell:
            for number, chunk in enumerate(torch.arange(len(samples)).split(SHARD)):
                rows, counts = [], []
                for part in by_length(samples, chunk).split(task.batch_size):
                    given, _ = task.examples(samples, part)
                    with torch.no_grad():
                        told = torch.stack(ask(part, given), dim=2).to(KEPT).cpu()
                    mask = token_mask(given)
                    whole = mask if mask is not None else torch.ones(told.shape[:2]).bool()
                    rows += [one[own] for one, own in zip(told, whole, strict=True)]
                    counts += whole.sum(1).tolist()
                    done += len(part)
                    tell(done)
                order = by_length(samples, chunk).argsort()
                rows, counts = [rows[int(i)] for i in order], [counts[int(i)] for i in order]
                starts = torch.tensor([0, *counts]).cumsum(0)
                save_file({"rows": torch.cat(rows), "starts": starts}, folder / _file(number))

    return _reader(stages.store.stage("hidden-states", inputs, build))


def _reader(stage: Stage) -> Goals:
    @lru_cache(maxsize=OPEN)
    def shard(number: int) -> tuple[Any, Tensor]:
        file: Any = safe_open(stage.path / _file(number), framework="pt")
        return file.get_slice("rows"), file.get_tensor("starts")

    def read(indices: Tensor, given: Batch) -> tuple[Tensor, ...]:
        parts = []
        for index in indices.tolist():
            rows, starts = shard(index // SHARD)
            place = index % SHARD
            parts.append(rows[int(starts[place]) : int(starts[place + 1])])
        mask = token_mask(given)
        if mask is None:
            found = torch.stack(parts)
        else:  # tokens that only pad don't count
            found = torch.zeros(*mask.shape, *parts[0].shape[1:], dtype=KEPT)
            found[mask.cpu()] = torch.cat(parts)
        return found.float().unbind(2)

    return read


def _file(number: int) -> str:
    return f"{number:05}.safetensors"
