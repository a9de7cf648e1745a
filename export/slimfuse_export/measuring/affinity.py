"""Which cores a measurement runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from slimfuse_export.environment import cores_allowed, cpu_quota


def cores_available() -> float:
    """Return cores' worth of time this process may use: the scheduler's and control group's."""
    quota = cpu_quota()
    return cores_allowed() if quota is None else min(cores_allowed(), quota)


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Keep this thread, and those it starts, on as many cores as it has threads; yield their ids.

    The last cores are taken, because the first ones serve interrupts. Nothing is pinned, and none
    yielded, where the platform can't or there are fewer cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    before = os.sched_getaffinity(0)
    chosen = tuple(sorted(before)[-threads:])
    if len(chosen) < threads:
        yield ()
        return
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)
