"""Shapes that are refused, with reasons and what would do."""

from __future__ import annotations

from typing import Any

import pytest
from shapes.legal import Timer, count, parent, weights

from slimfuse.errors import ShapeError
from slimfuse.families import Shape, ViT
from slimfuse.shapes import (
    HEADER,
    Budget,
    Wish,
    resolve,
)


def test_an_illegal_number_is_refused_with_what_would_do() -> None:
    with pytest.raises(ShapeError) as caught:
        resolve(Wish(18), parent(), ViT())
    error = caught.value
    assert error.where == "target.hidden_size"
    assert "18" in str(error.got) and str(error.allowed) == "hidden_size 16 or 20"
    assert error.hint == "or num_attention_heads 2 or 3 with hidden_size 18"


@pytest.mark.parametrize(
    ("wish", "where", "allowed"),
    [
        (Wish(40), "target.hidden_size", "1 … 32"),
        (Wish(0.5, 5), "target.num_attention_heads", "1 … 4"),
        (Wish(intermediate_size=73), "target.intermediate_size", "1 … 72"),
        (Wish(num_hidden_layers=4), "target.num_hidden_layers", "1 … 3"),
    ],
)
def test_larger_than_the_parent_is_refused(wish: Wish, where: str, allowed: str) -> None:
    with pytest.raises(ShapeError) as caught:
        resolve(wish, parent(), ViT())
    assert caught.value.where == where and caught.value.allowed == allowed


@pytest.mark.parametrize("value", [0, -3, 0.0, 1.5, float("nan"), True, "half"])
def test_values_out_of_range(value: Any) -> None:
    with pytest.raises(ShapeError, match="out of range") as caught:
        Wish(value)
    assert caught.value.where == "target.hidden_size" and caught.value.got is value
    with pytest.raises(ShapeError, match="out of range"):
        Budget("params", value)


def test_malformed_budgets() -> None:
    with pytest.raises(ShapeError, match="out of range") as caught:
        Budget("latency_ratio", 3)
    assert caught.value.allowed == "a ratio in (0, 1]"
    with pytest.raises(ShapeError, match="no such budget"):
        Budget("joules", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="no such size"):
        Wish(free=("width",))
    with pytest.raises(ShapeError, match="nothing to shrink") as caught:
        Wish(8, intermediate_size=0.5, budget=Budget("params", 0.5))
    assert caught.value.got == "hidden_size 8; intermediate_size 0.5"


@pytest.mark.parametrize("kind", ["params", "flops", "latency_ratio"])
def test_an_unreachable_budget_says_what_is_reachable(kind: Any) -> None:
    config = parent()
    timer = Timer(config, lambda r: 0.1 + 0.9 * r)
    with pytest.raises(ShapeError) as caught:
        resolve(Wish(16, budget=Budget(kind, 0.001)), config, ViT(), time_ratio=timer)
    error = caught.value
    assert error.where == f"target.budget.{kind}"
    assert "16 wide, 3 deep, 4 heads, MLP 1" in error.what
    assert "up to 0.001 of the parent's" in str(error.got)
    assert str(error.allowed).startswith("from ")
    assert "leave out hidden_size" in str(error.hint) and "num_hidden_layers" in str(error.hint)
    if kind != "latency_ratio":
        least = count(kind, config, Shape(16, 4, 1, 3))
        assert f"{least:,}" in str(error.allowed)


def test_refusals_name_the_key_what_was_got_and_what_may_be() -> None:
    rounding = resolve(Wish(0.55), parent(), ViT()).refused[0]  # 17.6 units, 18 by rounding
    assert rounding.shape.hidden_size == 18 and rounding.key == "hidden_size"
    assert "got hidden_size 18, num_attention_heads 4" in rounding.reason
    assert "allowed hidden_size 16 or 20" in rounding.reason
    config = parent(64, 4, 256, 2)
    over = resolve(Wish(budget=Budget("params", 0.5)), config, ViT()).refused
    assert over
    for refusal in over:
        used, limit = weights(ViT().narrow(config, refusal.shape)), int(weights(config) / 2)
        assert refusal.reason == f"params: over the budget; got {used:,}, allowed up to {limit:,}"
    heads = resolve(Wish(0.5, 2), parent(), ViT()).refused  # 16 units: three heads won't do
    assert [r.shape.num_attention_heads for r in heads] == [3]


def test_rows_fill_a_table() -> None:
    got = resolve(Wish(budget=Budget("flops", 0.5)), parent(64, 4, 256, 2), ViT())
    rows = got.rows()
    assert {len(row) for row in rows} == {len(HEADER)}
    assert rows[0][:2] == ("chosen", str(got.shape))
    assert [row[0] for row in rows].count("possible") == len(got.alternatives) > 0
    assert rows[-1][-1] == got.refused[-1].reason
