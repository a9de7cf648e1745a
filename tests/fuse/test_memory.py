"""Large buffers go back to the system when they are freed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from slimfuse.fuse.memory import LARGE, hold_steady


def resident() -> int:
    """Return the bytes of this process that lie in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_freed_buffers_leave_the_process() -> None:
    if not hold_steady():
        pytest.skip("not glibc")
    torch.ones(6 << 20)  # 24 MiB, freed: by itself glibc would now keep what is smaller
    before = resident()
    held = [torch.ones(LARGE // 2) for _ in range(16)]  # 8 MiB each
    full = resident()
    small = torch.ones(1000)  # behind them in the heap, if that is where they are
    del held
    # 128 MiB came and went; two may have found room in older holes; glibc keeps four
    assert full - before > 112 << 20
    assert resident() - before < 24 << 20 and float(small.sum()) == 1000
