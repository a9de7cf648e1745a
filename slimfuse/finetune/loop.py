"""The one training loop: AdamW on accelerate, exact resume, held-out choice, bad steps skipped."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from slimfuse.errors import SlimfuseError
from slimfuse.finetune.checkpoint import Progress, restore, save
from slimfuse.finetune.schedule import Schedule, batch_indices, parameter_groups
from slimfuse.finetune.several import (
    check_same_step,
    freeze_unused,
    spread_average,
    spreads,
    strides_may_differ,
    whole,
)
from slimfuse.finetune.validate import Validation
from slimfuse.interrupt import Held, held
from slimfuse.progress import Tracker, console, track

Precision = Literal["fp32", "bf16"]
Loss = Callable[[nn.Module, Tensor], Tensor]
CHECKPOINT_SECONDS = 60.0
APART = 1_000_000_007
"""Between the seeds of two processes."""
MOST_BAD = 6
"""Steps in a row without a finite loss before training gives up; from the second on each halves the
rate."""


class Constraint(Protocol):
    """What holds of the weights, and no step may undo: zeros that stay, answers that don't move."""

    def apply(self, model: nn.Module) -> None:
        """Make it hold before the first step."""

    def apply_gradients(self, model: nn.Module) -> None:
        """Take out of the gradients what would undo it."""

    def holding(self, model: nn.Module) -> Callable[[], None]:
        """Return what makes it hold again, after a step."""


class Log(Protocol):
    """Where a training writes what it sees as it goes."""

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures of a step, counted from 1."""


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
    constraint: Constraint | None = None,
    blocks: Sequence[str] = (),
    validation: Validation | None = None,
    compiled: bool = False,
    log: Log | None = None,
) -> Progress:
    """Train `model` in place and return its progress: the loss of every step, the best of them.

    loss: called with the model and the indices (batch,) of some samples, whose mean it returns.
    lengths: of the samples (samples,), where they differ; None: all are of one length.
    constraint: what no step may undo; gradients against it don't count in the norm that is
    clipped, nor in the optimizer's moments, and it holds of the averaged weights, too.
    blocks: paths of the model's layers in order, which `layer_decay` counts.
    validation: what is measured on held-out samples: the model ends with the weights that were the
    best there. compiled: whether torch compiles the model. log: takes the figures of every step.
    checkpoint: a safetensors file, written every minute, on Ctrl-C and on SIGTERM, which wait for
    the end of the step; if it exists, training goes on from it and ends with the same weights as an
    undisturbed run, because the order of the samples and the random numbers of a step depend on
    the seed and the step alone. The last one is left for the caller to remove once the weights are
    safe; beside it lie the best weights, where there is a validation.
    A step whose loss or gradient is not finite changes nothing; the second one in a row and all
    that follow it halve the rate for good, and the sixth raises SlimfuseError.
    In several processes of an accelerate or torchrun launch each sees its share of every step, and
    the main one writes; all have to see one checkpoint. FSDP2 trains a spread copy, whose whole
    weights the model has in the end.
    """
    run = _Run(model, loss, samples, schedule, precision, checkpoint, what, lengths, constraint,
               validation, log)  # fmt: skip
    run.begin(blocks, compiled)
    with track(what, schedule.steps) as tell, held(run.rescue) as waiting:
        tell(len(run.progress.losses))
        while len(run.progress.losses) < schedule.steps and not run.progress.stopped:
            run.obey(waiting)
            run.step()
            run.watch(tell)
        run.save()
    run.finish()
    return run.progress


@dataclass
class _Run:
    """One training: its arguments as `fit` has them, and what it has come to."""

    model: nn.Module
    loss: Loss
    samples: int
    schedule: Schedule
    precision: Precision
    checkpoint: Path
    what: str
    lengths: Tensor | None
    constraint: Constraint | None
    validation: Validation | None
    log: Log | None
    progress: Progress = field(default_factory=Progress)
    average: AveragedModel | None = None
    updating: bool = False
    buffers: list[Tensor] = field(default_factory=list)  # those from before an unfinished step
    seen: dict[str, float] = field(default_factory=dict)  # of the last step
    held_out: str = ""
    unused: list[nn.Parameter] = field(default_factory=list)
    met: bool = False  # whether all processes stand between the same two steps
    saved: float = 0.0

    def begin(self, blocks: Sequence[str], compiled: bool) -> None:
        """Make the optimizer, and go on from a checkpoint where there is one."""
        # autocast is ours: accelerate's own precision is fixed for the life of the process
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        self.spread = spreads(self.accelerator, constrained=self.constraint is not None)
        self.several = self.accelerator.num_processes > 1
        self.live = copy.deepcopy(self.model) if self.spread else self.model
        model, plan = self.live, self.schedule
        model.to(self.accelerator.device)
        self.train_mode()
        if self.constraint is not None:
            self.constraint.apply(model)
        groups = parameter_groups(model, plan.weight_decay, plan.layer_decay, blocks)
        # in one pass over the weights: 13 ms instead of 76 for 8 million of them on one core
        optimizer = torch.optim.AdamW(groups, lr=plan.lr, fused=True)
        if plan.ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan.ema))
        if self.several and not self.spread:
            few = self._share(self.indices(0).chunk(plan.accumulate)[0])[0]
            self.unused = freeze_unused(self.accelerator, model, lambda: self.loss(model, few))
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.spread and self.average is not None:
            spread_average(self.accelerator, self.average)
        if self.checkpoint.exists():
            self.progress = restore(self.checkpoint, model, self.optimizer, self.average)
            if self.validation is not None:
                self.validation.check(self.progress, self.best)
        if self.several:
            check_same_step(self.accelerator, len(self.progress.losses))
        self.hold = None if self.constraint is None else self.constraint.holding(model)
        if compiled:
            self.wrapped = torch.compile(self.wrapped)
        self.saved = time.monotonic()

    @property
    def best(self) -> Path:
        """Where the weights lie that were the best on held-out samples."""
        return self.checkpoint.with_name(f"{self.checkpoint.stem}-best.safetensors")

    def train_mode(self) -> None:
        """Put the model into training mode."""
        self.live.train()
        if not self.schedule.dropout:
            _without_dropout(self.live)

    def indices(self, number: int) -> Tensor:
        """Return the samples of a step, counted from 0."""
        plan = self.schedule
        lengths = self.lengths if plan.by_length else None
        return batch_indices(self.samples, number, plan.batch_size, plan.seed, lengths)

    def step(self) -> None:
        """Make one step, or leave one out whose loss or gradient isn't finite."""
        plan, progress, accelerator = self.schedule, self.progress, self.accelerator
        number = len(progress.losses)
        self.buffers = [buffer.clone() for buffer in self.live.buffers()]
        indices = self.indices(number)
        rate = plan.lr * plan.factor(number) * 0.5**progress.halvings
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        torch.manual_seed(plan.seed * 1_000_003 + number + APART * accelerator.process_index)
        with strides_may_differ() if self.several else contextlib.nullcontext():
            value = self._gradients(indices)
        if self.constraint is not None:
            self.constraint.apply_gradients(self.live)
        norm = float(whole(accelerator.clip_grad_norm_(self.wrapped.parameters(), plan.clip)))
        finite = math.isfinite(value) and math.isfinite(norm)
        self.updating = True
        if finite:
            self.optimizer.step()
            if self.hold is not None:
                self.hold()
            if self.average is not None:
                self.average.update_parameters(self.live)
        else:
            self._put_back()
        self.optimizer.zero_grad()
        progress.losses.append(value if finite else math.nan)
        self.seen = {"loss": progress.losses[-1], "rate": rate, "norm": norm}
        self._count_bad(finite)

    def _gradients(self, indices: Tensor) -> float:
        """Add up the gradients of a step's parts, and return its loss."""
        accelerator = self.accelerator
        parts = indices.chunk(self.schedule.accumulate)
        total = torch.zeros((), device=accelerator.device)
        for place, part in enumerate(parts):
            own, share = self._share(part)
            share *= len(part) / len(indices)
            last = place == len(parts) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                with torch.autocast(
                    accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16"
                ):
                    value = self.loss(self.wrapped, own)
                accelerator.backward(value if share == 1 else value * share)
            total += value.detach() * share
        return float(accelerator.reduce(total, "mean"))

    def _share(self, part: Tensor) -> tuple[Tensor, float]:
        """Return the samples of a part that this process sees, and what their mean loss counts.

        Gradients are averaged over processes, so that the shares' mean is one.
        """
        processes = self.accelerator.num_processes
        if processes == 1:
            return part, 1.0
        own = part[self.accelerator.process_index :: processes]
        return (own, len(own) * processes / len(part)) if len(own) else (part[:1], 0.0)

    def _put_back(self) -> None:
        for buffer, before in zip(self.live.buffers(), self.buffers, strict=False):
            buffer.copy_(before)

    def _count_bad(self, finite: bool) -> None:
        progress, number = self.progress, len(self.progress.losses)
        if finite:
            progress.bad = 0
            return
        progress.bad += 1
        progress.halvings += progress.bad > 1
        if self.accelerator.is_main_process:
            rest = "skipped" if progress.bad == 1 else "skipped, and the rate is halved"
            console.print(f"  {self.what}: step {number} has no finite loss: {rest}")
        if progress.bad >= MOST_BAD:
            self.save()
            raise SlimfuseError(
                f"the loss is not finite in {progress.bad} steps in a row, up to step {number}, "
                f"while {self.what}",
                hint="lower the learning rate, or set runtime.precision: fp32; the weights from "
                f"before these steps are in {self.checkpoint}",
            )

    def watch(self, tell: Tracker) -> None:
        """Measure, write and tell what the last step has made due."""
        progress, number = self.progress, len(self.progress.losses)
        held_out = self.validation
        if held_out is not None and held_out.due(number, self.schedule.steps):
            judged = self.live if self.average is None else self.average.module
            self._same_statistics()
            judged.eval()
            with torch.no_grad():
                main = self.accelerator.is_main_process
                value = held_out.judge(
                    judged, number, progress, self.best, write=main, agree=self._agreed
                )
            self.train_mode()
            self.seen["validation"] = value
            self.held_out = f"{held_out.name} {value:.4g}"
        if self.log is not None and self.accelerator.is_main_process:
            self.log(number, self.seen)
        words = (f"loss {self.seen['loss']:.3f}", self.held_out, f"rate {self.seen['rate']:.1e}")
        tell(number, ", ".join(word for word in words if word))
        self.updating, self.buffers = False, []  # with what it made due the step is whole
        due = time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        if self._anywhere(due and self.accelerator.is_main_process) if self.spread else due:
            self.save()

    def _same_statistics(self) -> None:
        """Give all processes the main one's buffers: normalisation sees its own samples in each."""
        if self.several and not self.spread:
            models = [self.live, *([self.average.module] if self.average is not None else [])]
            for buffer in (b for model in models for b in model.buffers()):
                buffer.copy_(broadcast(buffer.clone()))

    def _agreed(self, value: float) -> float:
        """Return the main process's value, by which all decide."""
        if not self.several:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(broadcast(told))

    def obey(self, waiting: Held) -> None:
        """Raise a signal that has come to any process."""
        others = self.several and self._anywhere(bool(waiting.came))
        self.met = True
        waiting.obey(others=others)
        self.met = False

    def _anywhere(self, here: bool) -> bool:
        """Return whether something holds in any process; all have to ask."""
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def save(self) -> None:
        """Write the checkpoint."""
        main = self.accelerator.is_main_process
        if main or self.spread:
            save(self.checkpoint, self.live, self.optimizer, self.average, self.progress,
                 main)  # fmt: skip
        self.saved = time.monotonic()

    def rescue(self) -> None:
        """Save what is whole before the process ends; a half-made step is forgotten.

        Spread weights are whole only where all processes have met.
        """
        if self.updating or not self.progress.losses or (self.spread and not self.met):
            return
        self._put_back()
        self.save()
        done = f"{len(self.progress.losses)} of {self.schedule.steps} steps"
        console.print(f"  {self.what}: saved after {done}")

    def finish(self) -> None:
        """Leave the model with the weights that training is for, in evaluation mode."""
        last = self.live if self.average is None else self.average.module
        if last is not self.model:
            self.model.load_state_dict({k: whole(v) for k, v in last.state_dict().items()})
        if self.several:
            self.accelerator.free_memory()  # DDP's hooks, too
        for parameter in self.unused:
            parameter.requires_grad_(True)
        if self.validation is not None:
            self.accelerator.wait_for_everyone()
            self.validation.best_of(self.model, self.progress, self.best)
        self.model.eval()


def _without_dropout(model: nn.Module) -> None:
    """Put the model into evaluation mode, which transformers know only by dropout.

    Normalisation by batches still learns its statistics.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
