"""What the C library keeps of the memory that was freed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE = 4 << 20


def hold_steady() -> bool:
    """Make glibc give buffers of 4 MiB and more back at once; return whether there is a glibc.

    By itself it moves that limit up to 32 MiB as soon as such a buffer is freed, and then the
    holes that many batches of buffers leave in its heap add up.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or none to be named so
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, 2 * LARGE))
