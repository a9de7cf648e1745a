"""The atlas: shapes that follow from legs, and every gap in one error."""

from __future__ import annotations

import pytest

from slimfuse.spaces import Atlas, AtlasError, Role, Space

PATTERNS = {
    "up": "^mlp _resid",
    "down": "^resid _mlp",
    "keys": "(^head _qk) _resid",
    "queries": "(^head ^qk) _resid",
    "out": "^resid (_head =fixed)",
}
SPACES = [
    Space("resid", 5, "stream"),
    Space("mlp", 7, "mlp"),
    Space("head", 3, "head"),
    Space("qk", 2, "qk"),
    Space("fixed", 11, "fixed"),
]
SHAPES = {"up": (7, 5), "down": (5, 7), "keys": (6, 5), "queries": (6, 5), "out": (5, 33)}


def gaps(atlas: Atlas, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    with pytest.raises(AtlasError) as caught:
        atlas.check(shapes)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_a_fitting_model_passes() -> None:
    Atlas.declare(PATTERNS, SPACES).check(SHAPES)


def test_shapes_follow_from_the_legs() -> None:
    atlas = Atlas.declare(PATTERNS, SPACES)
    assert {name: atlas.shape(name) for name in PATTERNS} == SHAPES


def test_free_spaces_are_all_but_the_fixed_ones() -> None:
    assert Atlas.declare(PATTERNS, SPACES).free == ("resid", "mlp", "head", "qk")


def test_users_are_told_apart_by_role_also_inside_a_flattened_axis() -> None:
    atlas = Atlas.declare(PATTERNS, SPACES)
    assert atlas.users("head", Role.WRITE) == ("keys", "queries")
    assert atlas.users("head", Role.READ) == ("out",)
    assert atlas.users("qk", Role.READ) == ("keys",)


def test_a_wrong_shape_is_told_with_both_shapes() -> None:
    atlas = Atlas.declare(PATTERNS, SPACES)
    assert gaps(atlas, SHAPES | {"up": (5, 7)}) == ["up: has shape (5, 7), its legs say (7, 5)"]


def test_a_wrong_rank_is_a_wrong_shape() -> None:
    atlas = Atlas.declare(PATTERNS, SPACES)
    assert gaps(atlas, SHAPES | {"up": (7, 5, 1)}) == [
        "up: has shape (7, 5, 1), its legs say (7, 5)"
    ]


def test_an_unused_space_is_told() -> None:
    atlas = Atlas.declare(PATTERNS, [*SPACES, Space("spare", 13, "fixed")])
    assert gaps(atlas, SHAPES) == ["space spare: no parameter uses it"]


def test_a_space_nobody_reads_and_one_nobody_writes_are_told() -> None:
    patterns = PATTERNS | {"down": "^resid _other", "seen": "^mlp"}
    atlas = Atlas.declare(patterns, [*SPACES, Space("other", 7, "mlp")])
    assert gaps(atlas, SHAPES | {"seen": (7,)}) == [
        "space mlp: nothing reads it",
        "space other: nothing writes it",
    ]


def test_a_fixed_space_needs_neither_writer_nor_reader() -> None:
    assert "fixed" not in Atlas.declare(PATTERNS, SPACES).free
    Atlas.declare(PATTERNS, SPACES).check(SHAPES)


def test_all_gaps_come_at_once() -> None:
    patterns = {**PATTERNS, "ghost": "^resid", "up": "^mlp _stranger"}
    spaces = [*SPACES, Space("spare", 13, "fixed")]
    shapes = SHAPES | {"newcomer": (5,)}
    found = gaps(Atlas.declare(patterns, spaces), shapes)
    assert found == [
        "ghost: is not in the model",
        "newcomer: has no legs",
        "space spare: no parameter uses it",
        "space stranger: is not declared",
    ]
    # sizes are compared as well, once every space is known
    known = Atlas.declare(patterns | {"up": "^mlp _resid"}, spaces)
    assert "down: has shape (7, 5), its legs say (5, 7)" in gaps(known, shapes | {"down": (7, 5)})
    assert len(gaps(known, shapes | {"down": (7, 5)})) == 4
