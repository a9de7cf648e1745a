"""Real processes (gloo) for tests, as a launcher starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import InitProcessGroupKwargs

RANKS = 2


def start(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(accelerator, *arguments)` in two processes and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (port, work, arguments)
    torch.multiprocessing.start_processes(_as_rank, given, nprocs=RANKS, start_method="fork")  # type: ignore[no-untyped-call]


def _as_rank(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",  # as launchers set it, or accelerate warns
    }  # fmt: skip
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.set_num_threads(1)
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=60))  # a hang fails
    accelerator = Accelerator(cpu=True, mixed_precision="no", kwargs_handlers=[limit])
    assert accelerator.num_processes == RANKS and accelerator.is_main_process == (rank == 0)
    work(accelerator, *arguments)
    accelerator.end_training()
