"""Streams kept in memory and on disk come back the same, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimfuse.fuse.cache import StreamCache


@pytest.mark.parametrize("limit", [0, 250, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_put_comes_back(tmp_path: Path, limit: int, dtype: torch.dtype) -> None:
    values = {("x0", b): torch.randn(2, 3, 5 + b).to(dtype) for b in range(4)}
    with StreamCache(limit, tmp_path) as cache:
        for (name, b), value in values.items():
            cache.put(name, b, value)
        assert all(torch.equal(cache.get(*key), value) for key, value in values.items())
        assert (limit == 0) <= (cache.on_disk == 4) and (cache.on_disk == 0) == (limit > 250)
        cache.put("x0", 1, values["x0", 3])
        assert torch.equal(cache.get("x0", 1), values["x0", 3])
        cache.drop("x0", 1)
        with pytest.raises(KeyError):
            cache.get("x0", 1)
    assert not list(tmp_path.iterdir())


def test_room_that_was_freed_is_used_again(tmp_path: Path) -> None:
    one = torch.zeros(100)
    with StreamCache(limit=400, folder=tmp_path) as cache:
        cache.put("a", 0, one)
        cache.put("b", 0, one)
        assert cache.on_disk == 1
        cache.drop("a", 0)
        cache.drop("b", 0)
        cache.put("c", 0, one)
        assert cache.on_disk == 0
        assert not [f for f in tmp_path.rglob("*") if f.is_file()]
