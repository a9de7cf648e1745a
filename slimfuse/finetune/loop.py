"""The one training loop: AdamW, warm-up and cosine, exact resume from any checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from slimfuse.errors import SlimfuseError
from slimfuse.finetune.interrupt import held
from slimfuse.progress import console, track

Precision = Literal["fp32", "bf16"]
Loss = Callable[[nn.Module, Tensor], Tensor]
CHECKPOINT_SECONDS = 60.0
MAX_GRAD_NORM = 1.0
POOL = 50  # batches whose samples are sorted by length at a time


class Zeros(Protocol):
    """Weights that are zero and stay so."""

    def apply(self, model: nn.Module) -> None:
        """Set them to zero."""

    def apply_gradients(self, model: nn.Module) -> None:
        """Set their gradients to zero."""

    def holding(self, model: nn.Module) -> Callable[[], None]:
        """Return what sets them to zero again."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast, and in which order.

    warmup: a fraction of the steps; ema: a decay per step; dropout: whether the model's own is
    active; by_length: whether samples of like length share a batch.
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


def steps_of(samples: int, epochs: float, batch_size: int) -> int:
    """Return how many optimizer steps `epochs` passes over `samples` take."""
    return round(epochs * math.ceil(samples / batch_size))


def best_precision() -> Precision:
    """Return bf16 where this machine computes it natively, else fp32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def fit(
    model: nn.Module,
    loss: Loss,
    samples: int,
    schedule: Schedule,
    *,
    precision: Precision,
    checkpoint: Path,
    what: str,
    lengths: Tensor | None = None,
    zeros: Zeros | None = None,
) -> list[float]:
    """Train `model` in place and return the loss of every step.

    loss: called with the model and the indices (batch,) of the samples of one step.
    lengths: of the samples (samples,), where they differ; None: all are of one length.
    zeros: weights that no step may bring back; their gradients don't count in the norm that is
    clipped, nor in the optimizer's moments, and the averaged weights have them, too.
    checkpoint: a safetensors file, written every minute and on Ctrl-C, which waits for the end of
    the step; if it exists, training goes on from it and ends with the same weights as an
    undisturbed run, because the order of the samples and the random numbers of a step depend on
    the seed and the step alone. The last one is left for the caller to remove once the weights are
    safe.
    Raises SlimfuseError when the loss is not finite.
    """
    # autocast is ours: accelerate's own precision is fixed for the life of the process
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    device = accelerator.device.type
    model.to(accelerator.device).train()
    if zeros is not None:
        zeros.apply(model)
    if not schedule.dropout:
        _without_dropout(model)
    optimizer = torch.optim.AdamW(_groups(model, schedule.weight_decay), lr=schedule.lr)
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema))
        if schedule.ema
        else None
    )
    history: list[float] = []
    if checkpoint.exists():
        history = _restore(checkpoint, model, optimizer, average)
    hold = None if zeros is None else zeros.holding(model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    saved = time.monotonic()
    updating, buffers = False, list[Tensor]()  # those from before an unfinished step

    def rescue() -> None:
        if updating or not history:
            return
        for buffer, before in zip(model.buffers(), buffers, strict=False):
            buffer.copy_(before)
        _save(checkpoint, model, optimizer, average, history)
        console.print(f"  {what}: saved after {len(history)} of {schedule.steps} steps")

    with track(what, schedule.steps) as tell, held(rescue) as obey:
        tell(len(history))
        for step in range(len(history), schedule.steps):
            obey()
            buffers = [buffer.clone() for buffer in model.buffers()]
            indices = batch_indices(
                samples, step, schedule.batch_size, schedule.seed,
                lengths if schedule.by_length else None,
            )  # fmt: skip
            torch.manual_seed(schedule.seed * 1_000_003 + step)
            rate = schedule.lr * _factor(step, schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                value = loss(wrapped, indices)
            if not bool(torch.isfinite(value)):
                raise SlimfuseError(
                    f"the loss is not finite at step {step} while {what}",
                    hint="lower the learning rate, or set runtime.precision: fp32",
                )
            accelerator.backward(value)
            if zeros is not None:
                zeros.apply_gradients(model)
            accelerator.clip_grad_norm_(wrapped.parameters(), MAX_GRAD_NORM)
            updating = True
            optimizer.step()
            if hold is not None:
                hold()
            optimizer.zero_grad()
            if average is not None:
                average.update_parameters(model)
            history.append(float(value.detach()))
            updating, buffers = False, []
            tell(step + 1, f"loss {history[-1]:.3f}")
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                _save(checkpoint, model, optimizer, average, history)
                saved = time.monotonic()
        _save(checkpoint, model, optimizer, average, history)
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    model.eval()
    return history


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


def _without_dropout(model: nn.Module) -> None:
    """Put the model into evaluation mode, which transformers know only by dropout.

    Normalisation by batches still learns its statistics.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()


def _factor(step: int, schedule: Schedule) -> float:
    """Return the rate of `step` relative to the peak: linear warm-up, then half a cosine."""
    warm = max(1, round(schedule.warmup * schedule.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, schedule.steps - warm)
    return 0.5 * (1 + math.cos(math.pi * done))


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices only: not biases, norms, class tokens and positions."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = {p for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)
                for p in m.parameters(recurse=False) if p.ndim > 1}  # fmt: skip
    return [
        {"params": [p for p in parameters if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p not in matrices], "weight_decay": 0.0},
    ]


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    history: list[float],
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    tensors["history"] = torch.tensor(history, dtype=torch.float64)
    temporary = path.with_suffix(".writing")  # a stage forgets it, and keeps the whole one
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # else the name may outlive the content when the power fails
    temporary.replace(path)


def _restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None
) -> list[float]:
    try:
        tensors = load_file(path)
    except SafetensorError:  # damaged on disk: start over rather than stop
        path.unlink()
        return []

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    if average is not None:
        average.load_state_dict(part("average."))
    return [float(v) for v in tensors["history"]]
