"""Training in several processes: DDP, and FSDP2, which spreads every tensor over all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from slimfuse.errors import UserError

PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def whole(value: Tensor) -> Tensor:
    """Return a tensor with all its parts; all processes have to ask for the same ones in turn."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def like(value: Tensor, own: Tensor) -> Tensor:
    """Return a whole tensor spread as `own` is."""
    if not hasattr(own, "full_tensor") or value.shape != own.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    there: Tensor = distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return there


def spreads(accelerator: Accelerator, *, constrained: bool) -> bool:
    """Return whether the launch spreads the weights (FSDP2); raises UserError for what can't be.

    constrained: whether something holds of the weights after each step.
    """
    hint = "see docs/accelerate/fsdp2.yaml, or train with DDP (docs/accelerate/ddp.yaml)"
    if accelerator.distributed_type in PLAIN:
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise UserError(
                "accelerate spreads weights over graphics cards only",
                got=f"FSDP with {accelerator.num_processes} processes on {accelerator.device.type}",
                hint=hint,
            )
        return False
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if not accelerator.is_fsdp2:
        raise UserError(
            "this way to train in several processes isn't known here",
            got=f"{accelerator.distributed_type.value}, FSDP version "
            f"{getattr(plugin, 'fsdp_version', None)}",
            allowed="DDP; FSDP with fsdp_version: 2",
            hint=hint,
        )
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "every process has to load the weights",
            got="fsdp_cpu_ram_efficient_loading: true",
            allowed="false",
            hint=hint,
        )
    if constrained:
        raise UserError(
            "weights that stay zero, or protect answers, are trained with DDP only",
            got="FSDP 2",
            hint="start the same command with docs/accelerate/ddp.yaml: it goes on from here",
        )
    return True


def spread_average(accelerator: Accelerator, average: AveragedModel) -> None:
    """Spread the averaged weights as the model's own are (FSDP2)."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    average.module = fsdp2_prepare_model(accelerator, average.module)


def freeze_unused(
    accelerator: Accelerator, model: nn.Module, loss: Callable[[], Tensor]
) -> list[nn.Parameter]:
    """Freeze the parameters that a loss doesn't depend on, and return them.

    DDP waits for the gradient of all that aren't frozen, even of a pooler that nothing reads. The
    optimizer leaves what has no gradient as it is, too.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        buffers = [buffer.clone() for buffer in model.buffers()]
        loss().backward()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    wanted = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([float(p.grad is not None) for p in wanted], device=accelerator.device)
    used = accelerator.reduce(used, "sum")
    unused = [p for p, count in zip(wanted, used.tolist(), strict=True) if not count]
    model.zero_grad()
    for parameter in unused:
        parameter.requires_grad_(False)
    return unused


@contextmanager
def strides_may_differ() -> Iterator[None]:
    """Hide DDP's word on gradients of size one, whose strides say nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield


def check_same_step(accelerator: Accelerator, step: int) -> None:
    """Raise UserError where the processes don't go on from one checkpoint."""
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            "the processes don't read the same checkpoint",
            got=f"{', '.join(map(str, steps))} steps done",
            hint="put the run folder (--out) on a file system that all nodes share",
        )
