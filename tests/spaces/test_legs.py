"""The pattern language of legs: what it means, and what it says when it is malformed."""

from __future__ import annotations

import re

import pytest

from slimfuse.spaces import Leg, Role, parse


def test_each_mark_is_a_role_and_parentheses_are_one_flattened_axis() -> None:
    assert parse("(^head.3 _qk.3) _resid =rows") == (
        (Leg("head.3", Role.WRITE), Leg("qk.3", Role.READ)),
        (Leg("resid", Role.READ),),
        (Leg("rows", Role.FIXED),),
    )


def test_parts_of_a_flattened_axis_keep_their_order() -> None:
    assert parse("(_a ^b =c)")[0] == tuple(reversed(parse("(=c ^b _a)")[0]))


def test_white_space_carries_no_meaning() -> None:
    assert parse("  (^a   _b)    =c ") == parse("(^a _b) =c")


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("^resid plain", "'plain'"),  # no mark
        ("^resid *x", "'*x'"),  # unknown mark
        ("^ _resid", "'^'"),  # no name
        ("(^head nope) _resid", "'nope'"),  # inside parentheses
        ("^3head", "'^3head'"),  # a name starts with a letter
        ("(^head _qk _resid", "'(^head'"),  # never closed
        ("^head) _resid", "'^head)'"),  # never opened
    ],
)
def test_a_malformed_part_is_named_with_its_pattern(pattern: str, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"malformed leg {part} in {pattern!r}")):
        parse(pattern)


def test_an_axis_without_legs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"empty axis in '\^a \(\)'"):
        parse("^a ()")
