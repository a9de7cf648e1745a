"""Splits: parts, samples and selections, without decoding anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from slimfuse.data import Image, Split

N = 23


class Lazy(Sequence[Image]):
    """Images that remember which of them were decoded."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Image:  # type: ignore[override]
        self.read.append(i)
        return np.full((2, 3, 3), i, dtype=np.uint8)


def split() -> Split:
    return Split(Lazy(), np.arange(N, dtype=np.int64) * 10)


def ids(part: Split) -> list[int]:
    found = [int(part.items[i][0, 0, 0]) for i in range(len(part))]
    assert [10 * i for i in found] == part.labels.tolist()  # images and labels stay together
    assert len(part.items) == len(part)
    return found


@pytest.mark.parametrize("count", [1, 2, 5, N])
def test_the_parts_of_a_split_are_disjoint_and_complete(count: int) -> None:
    parts = [ids(split().shard(i, count)) for i in range(1, count + 1)]
    assert sorted(i for part in parts for i in part) == list(range(N))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_parts_are_shuffled_by_their_seed_alone() -> None:
    assert ids(split().shard(1, 3)) == ids(split().shard(1, 3))
    assert ids(split().shard(1, 3)) != ids(split().shard(1, 3, seed=1))
    assert ids(split().shard(1, 3)) != list(range(0, N, 3))


def test_a_part_of_a_part_are_samples_of_the_part() -> None:
    part = split().shard(2, 3)
    inner = ids(part.shard(1, 2)) + ids(part.shard(2, 2))
    assert sorted(inner) == sorted(ids(part))
    assert set(ids(part.sample(4, seed=0))) < set(ids(part))


def test_a_sample_has_no_sample_twice_and_at_most_all() -> None:
    assert len(set(ids(split().sample(7, seed=0)))) == 7
    assert ids(split().sample(7, seed=0)) != ids(split().sample(7, seed=1))
    assert ids(split().sample(99, seed=0)) == list(range(N))


@pytest.mark.parametrize("count", [1, 2, 5, N])
def test_pieces_are_the_split_cut_in_a_row(count: int) -> None:
    parts = [ids(split().piece(i, count)) for i in range(1, count + 1)]
    assert [i for part in parts for i in part] == list(range(N))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_first_are_the_first() -> None:
    assert ids(split().first(4)) == [0, 1, 2, 3]
    whole = split()
    assert whole.first(N) is whole
    assert ids(whole.piece(2, 2).first(2)) == ids(whole.piece(2, 2))[:2]


def test_selecting_decodes_nothing() -> None:
    whole = split()
    part = whole.shard(1, 2).sample(3, seed=0).take(np.arange(2))
    assert isinstance(whole.items, Lazy) and whole.items.read == []
    part.items[1]
    assert len(whole.items.read) == 1
