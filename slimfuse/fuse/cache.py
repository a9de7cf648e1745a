"""What a walk keeps between its blocks: the residual streams, on disk past a limit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEMORY_LIMIT = 32 << 20
"""Bytes of streams that are kept in memory; more go to files."""

Key = tuple[str, int]


class StreamCache:
    """Tensors by name and batch number, in memory up to `limit` bytes and in files beyond it.

    Files are read and written whole, not mapped, so that memory holds one batch of what lies on
    disk. folder: where they go (default: the system's temporary folder); they vanish with `close`.
    """

    def __init__(self, limit: int = MEMORY_LIMIT, folder: Path | None = None) -> None:
        self.limit, self._parent = limit, folder
        self._held: dict[Key, Tensor] = {}
        self._filed: dict[Key, tuple[torch.Size, torch.dtype]] = {}
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> StreamCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def on_disk(self) -> int:
        """How many tensors lie in files."""
        return len(self._filed)

    def put(self, name: str, batch: int, value: Tensor) -> None:
        """Keep a tensor, in the place of an earlier one of this name and batch."""
        self.drop(name, batch)
        key, size = (name, batch), value.numel() * value.element_size()
        if self._bytes + size <= self.limit:
            self._held[key] = value.detach().cpu()
            self._bytes += size
        else:
            value.detach().cpu().contiguous().numpy().tofile(self._file(key))
            self._filed[key] = (value.shape, value.dtype)

    def get(self, name: str, batch: int) -> Tensor:
        """Return a kept tensor."""
        key = (name, batch)
        if key in self._held:
            return self._held[key]
        shape, dtype = self._filed[key]
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        return torch.from_numpy(np.fromfile(self._file(key), kind)).reshape(shape)

    def drop(self, name: str, batch: int) -> None:
        """Forget a tensor, if it is kept."""
        key = (name, batch)
        held = self._held.pop(key, None)
        if held is not None:
            self._bytes -= held.numel() * held.element_size()
        if self._filed.pop(key, None) is not None:
            self._file(key).unlink()

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._held.clear()
        self._filed.clear()
        self._bytes = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _file(self, key: Key) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="streams-", dir=self._parent)
        return Path(self._folder.name) / f"{key[0]}-{key[1]}"
