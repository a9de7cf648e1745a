"""How long a training is and how fast, which samples a step sees, which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import get_scheduler
from transformers.pytorch_utils import Conv1D

Shape = Literal["cosine", "linear", "constant", "polynomial"]
NAMES: dict[Shape, str] = {
    "cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup",
    "polynomial": "polynomial",
}  # fmt: skip
"""What transformers call the schedules."""

POOL = 50  # batches whose samples are sorted by length at a time


@dataclass(frozen=True)
class Schedule:
    """How long and how fast, and in which order.

    batch_size: samples of a step, which are seen in `accumulate` parts; warmup: a fraction of the
    steps; shape: of the rate behind it; ema: a decay per step; dropout: whether the model's own is
    active; by_length: whether samples of like length share a batch; clip: the largest norm of a
    step's gradient; layer_decay: what the rate is multiplied by from each layer to the one below.
    """

    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    ema: float | None = None
    seed: int = 0
    dropout: bool = True
    by_length: bool = False
    shape: Shape = "cosine"
    accumulate: int = 1
    clip: float = 1.0
    layer_decay: float | None = None

    def factor(self, step: int) -> float:
        """Return the rate of a step, counted from 0, relative to the peak.

        Linear warm-up over `warmup` of the steps, then transformers' schedule of that name.
        """
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:  # the first step moves, too
            return (step + 1) / warm
        return float(_lambda(self.shape, warm, max(self.steps, warm + 1))(step))


@cache
def _lambda(shape: Shape, warm: int, steps: int) -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    made = get_scheduler(NAMES[shape], optimizer, num_warmup_steps=warm, num_training_steps=steps)
    return made.lr_lambdas[0]


def steps_of(samples: int, epochs: float, batch_size: int) -> int:
    """Return how many optimizer steps `epochs` passes over `samples` take: one, if any."""
    return max(round(epochs * math.ceil(samples / batch_size)), int(epochs > 0))


def batch_indices(
    samples: int, step: int, batch_size: int, seed: int, lengths: Tensor | None = None
) -> Tensor:
    """Return the samples of one step: a seeded shuffle per epoch, cut into batches.

    lengths: of the samples; then the shuffle is cut into pools of 50 batches, each is sorted by
    length before it is cut, and the batches are shuffled: they pad little, and stay random.
    """
    per_epoch = math.ceil(samples / batch_size)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 7_919 + epoch)
    order = torch.randperm(samples, generator=generator)
    if lengths is not None:
        pools = order.split(POOL * batch_size)
        order = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
        place = int(torch.randperm(per_epoch, generator=generator)[place])
    return order[place * batch_size : (place + 1) * batch_size]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float | None = None,
    blocks: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return AdamW's groups; `scale` in each is what its rate is multiplied by.

    Matrices of linear layers and convolutions decay; biases, norms, class tokens, positions and
    tables don't, nor a head that is a table. layer_decay: the rate of the last of `blocks` (paths
    of modules, in order) is multiplied by it once, of the one below twice, …, of all parameters
    before the first block, and of tables outside of blocks, once more; what stands behind them has
    the whole rate. Source: Clark et
    al. 2020 (ELECTRA, arXiv 2003.10555), appendix A; Bao et al. 2022 (BEiT, arXiv 2106.08254).
    """
    tables = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = {p for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | Conv1D)
                for p in m.parameters(recurse=False) if p.ndim > 1} - tables  # fmt: skip
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    depths = _depths(model, blocks) if layer_decay is not None else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if layer_decay is None else layer_decay ** depths[name]
            decay = weight_decay if parameter in matrices else 0.0
            groups.setdefault((decay, scale), []).append(parameter)
    order = sorted(groups, reverse=True)  # what decays first, as the optimizer's state counts them
    return [{"params": groups[k], "weight_decay": k[0], "scale": k[1]} for k in order]


def _depths(model: nn.Module, blocks: Sequence[str]) -> dict[str, int]:
    """Return how many layers every parameter stands below the model's last."""
    place = {path: len(blocks) - i for i, path in enumerate(blocks)}
    names = [name for name, _ in model.named_parameters()]
    homes = [next((place[b] for b in blocks if name.startswith(f"{b}.")), None) for name in names]
    first = next((i for i, home in enumerate(homes) if home is not None), 0)
    # registered before the blocks, or a table that they share, as MPNet's attention biases
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    low = [i < first or name in tables for i, name in enumerate(names)]
    others = [len(blocks) + 1 if below else 0 for below in low]
    return {n: o if h is None else h for n, h, o in zip(names, homes, others, strict=True)}
