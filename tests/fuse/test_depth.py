"""Which blocks a target block stands for: against brute force, and on planted streams."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import images, random_vit

from slimfuse.errors import ShapeError
from slimfuse.families import ViT
from slimfuse.fuse.depth import align, cka, group, match_depths


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_grouping_loses_as_little_as_the_best_of_all_groupings(
    changes: list[int], data: Any
) -> None:
    depth = data.draw(st.integers(1, len(changes)))

    def lost(cuts: tuple[int, ...]) -> int:
        edges = (0, *cuts, len(changes))
        parts = [changes[a:b] for a, b in pairwise(edges)]
        return sum(sum(p) - max(p) for p in parts)

    found = group([float(c) for c in changes], depth)
    assert [i for part in found for i in part] == list(range(len(changes)))
    assert len(found) == depth and all(len(p) for p in found)
    best = min(lost(c) for c in combinations(range(1, len(changes)), depth - 1))
    assert lost(tuple(p.stop for p in found[:-1])) == best


def test_equal_changes_are_cut_evenly() -> None:
    assert [len(p) for p in group([1.0] * 6, 3)] == [2, 2, 2]


def test_a_block_that_changes_nothing_shares_a_segment() -> None:
    assert [list(p) for p in group([5.0, 5.0, 0.0, 5.0], 3)] in (
        [[0], [1, 2], [3]], [[0], [1], [2, 3]],
    )  # fmt: skip


def test_a_target_deeper_than_its_parents_is_refused() -> None:
    with pytest.raises(ShapeError, match="deeper"):
        group([1.0, 1.0], 3)


@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 1000))
def test_alignment_is_the_best_monotone_one(rows: int, columns: int, seed: int) -> None:
    likeness = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    cuts = [0, *(p.stop for p in align(likeness))]
    assert cuts[-1] == columns - 1 and sorted(cuts) == cuts
    got = sum(likeness[r, c] for r, c in enumerate(cuts))

    def ways(row: int, least: int) -> list[list[int]]:
        if row == rows - 1:
            return [[columns - 1]]
        return [[c, *rest] for c in range(least, columns) for rest in ways(row + 1, c)]

    best = max(
        likeness[0, 0] + sum(likeness[r + 1, c] for r, c in enumerate(w)) for w in ways(1, 0)
    )
    assert abs(float(got - best)) < 1e-7  # the tie-break towards even cuts weighs 1e-9 a cut


def test_cka_ignores_rotation_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64))[0]
    assert abs(cka(x, 3 * x @ turn) - 1) < 1e-12  # float64 identity
    other = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    assert cka(x, other - other.mean(0)) < 0.9


def models(*depths: int) -> tuple[list[Any], list[Any]]:
    found = [random_vit(seed=i, num_hidden_layers=d) for i, d in enumerate(depths)]
    return found, [ViT().layout(m.config) for m in found]


def test_parents_of_the_targets_depth_keep_their_blocks() -> None:
    nets, layouts = models(3, 3)
    found = match_depths(nets, layouts, 3, lambda: [images(4)])
    assert [[list(r) for r in parts] for parts in found] == [[[0], [1], [2]]] * 2


def test_parents_of_any_depth_are_covered_in_order() -> None:
    nets, layouts = models(4, 2, 6)
    with torch.no_grad():
        found = match_depths(nets, layouts, 3, lambda: [images(6)])
    for parts, depth in zip(found, (4, 2, 6), strict=True):
        assert [i for part in parts for i in part] == list(range(depth))
        assert len(parts) == 3


def test_given_layers_are_taken_and_checked() -> None:
    nets, layouts = models(4)
    with torch.no_grad():
        found = match_depths(nets, layouts, 2, lambda: [images(4)], [[0], [1, 2, 3]])
        assert [list(r) for r in found[0]] == [[0], [1, 2, 3]]
        for wrong in ([[0, 1]], [[0], [2, 3]], [[0, 1, 2, 3], []]):
            with pytest.raises(ShapeError, match="every block"):
                match_depths(nets, layouts, 2, lambda: [images(4)], wrong)
