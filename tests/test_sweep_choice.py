"""Candidates of a sweep: their product, names and errors; the front and the pick."""

from __future__ import annotations

from itertools import pairwise

import pytest

from slimfuse.errors import ShapeError, UserError
from slimfuse.pipeline.candidates import ALONE, candidates, every
from slimfuse.pipeline.choosing import Option, choose, front
from slimfuse.report import GateResult

# -- candidates ---------------------------------------------------------------------------------


def test_the_candidates_are_the_product_in_the_order_of_the_options() -> None:
    found = candidates(
        ["target.hidden_size=0.5,0.25", "fuse.parents=[a,b]", "finetune.lr=1e-3, 1e-4,1e-3"],
        ["runtime.seed=3"],
    )
    assert [c.name for c in found] == [
        "hidden_size=0.5, lr=1e-3", "hidden_size=0.5, lr=1e-4",
        "hidden_size=0.25, lr=1e-3", "hidden_size=0.25, lr=1e-4",
    ]  # fmt: skip
    assert found[1].overrides == (
        "runtime.seed=3", "target.hidden_size=0.5", "fuse.parents=[a,b]", "finetune.lr=1e-4",
    )  # fmt: skip
    assert found[1].folder == "hidden_size=0.5+lr=1e-4"


def test_a_list_in_brackets_is_one_value_and_keys_with_one_end_keep_their_names() -> None:
    found = candidates(["fuse.layers=[[0], [1]],[[0, 1]]"])
    assert [c.overrides for c in found] == [
        ("fuse.layers=[[0], [1]]",), ("fuse.layers=[[0, 1]]",),
    ]  # fmt: skip
    found = candidates(["data.calibration.seed=0,1", "finetune.seed=2,3"])
    assert found[0].name == "data.calibration.seed=0, finetune.seed=2"


def test_folders_are_names_that_any_disk_takes_and_never_the_same() -> None:
    odd = candidates(["data.path='a/b','a:b','../c'", f"parents.0.from={'x' * 300},y"])
    folders = [c.folder for c in odd]
    assert len(set(folders)) == len(odd) == 6
    for folder in folders:
        assert len(folder) <= 100 and not set(folder) & set('/\\:*?"<>| ') and folder[0] != "."


def test_without_values_there_is_one_candidate() -> None:
    assert [(c.name, c.overrides) for c in candidates(["finetune.lr=1"])] == [
        (ALONE, ("finetune.lr=1",))
    ]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["target.hidden_size"], "not a key and its values"),
        (["target.hidden_size=0.5,,1"], "not a key and its values"),
        (["=1,2"], "not a key and its values"),
        (["finetune.lr=1,2", "finetune.lr=3,4"], "given twice"),
        (["finetune.lr=1,2", "finetune.lr=3"], "given twice"),
        (["bench.threads=[1],[2]"], "can't differ by this key"),
        (["gates=[],[{metric: params}]"], "can't differ by this key"),
        (["name=a,b"], "can't differ by this key"),
        (["runtime.threads=1,2"], "can't differ by this key"),
    ],
)
def test_options_that_make_no_sweep_are_refused(options: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        candidates(options)
    assert error.value.where == "--set" and error.value.exit_code == 2


def test_all_that_can_not_be_made_is_one_error() -> None:
    found = candidates(["finetune.lr=1,2,3"])

    def make(one: object) -> str:
        if "2" in str(one) or "3" in str(one):
            raise ShapeError("it doesn't fit", got=str(one)[-8:], allowed="1")
        return "made"

    with pytest.raises(UserError, match="2 of 3 candidates can't be made") as error:
        every(found, make)
    text = str(error.value)
    assert "lr=2:" in text and "lr=3:" in text and "lr=1:" not in text and "allowed: 1" in text


def test_a_fault_of_all_candidates_alike_is_told_once() -> None:
    def make(_one: object) -> str:
        raise ShapeError("it doesn't fit", where="target")

    with pytest.raises(ShapeError, match="doesn't fit") as error:
        every(candidates(["finetune.lr=1,2"]), make)
    assert error.value.what == "it doesn't fit"


# -- the front and the pick ---------------------------------------------------------------------


def option(name: str, quality: float, params: int, p50: float, *missing: float) -> Option:
    gates = tuple(
        GateResult(f"gate {i}", "a rule", f"missed {m}", m == 0, m) for i, m in enumerate(missing)
    )
    return Option(name, quality, params, p50, gates)


def never(_a: str, _b: str) -> bool:
    return False


def by_name(_slow: str, _fast: str) -> bool:
    """Whether the first one's name comes later: a, b, c … from the fastest to the slowest."""
    return _slow > _fast


def test_no_candidate_of_the_front_is_beaten_and_all_others_are() -> None:
    found = [
        option("a", 0.90, 10, 1.0), option("b", 0.95, 20, 2.0), option("c", 0.93, 30, 3.0),
        option("d", 0.97, 40, 4.0), option("e", 0.97, 40, 5.0),
    ]  # fmt: skip
    assert front(found, by_name) == ["a", "b", "d"]
    assert front(found, never) == ["a", "b", "d", "e"]  # e isn't measurably slower than d
    assert front(found[::-1], by_name) == ["d", "b", "a"]


def test_a_slower_one_that_is_smaller_is_on_the_front() -> None:
    found = [option("a", 0.9, 20, 1.0), option("b", 0.9, 10, 2.0)]
    assert front(found, by_name) == ["a", "b"]
    assert front(found, never) == ["b"]


def test_of_those_that_pass_the_fastest_is_picked() -> None:
    found = [
        option("a", 0.5, 10, 1.0, 0.4, 0.0), option("b", 0.95, 30, 2.0, 0.0, 0.0),
        option("c", 0.99, 20, 3.0, 0.0, 0.0),
    ]  # fmt: skip
    best = choose(found, by_name, {})
    assert best.name == "b" and "2 of 3 pass all 2 gates" in best.reason
    assert "fastest" in best.reason and not best.nearest


def test_of_equally_fast_ones_the_smallest_is_picked_then_the_best() -> None:
    found = [option("a", 0.9, 30, 1.0, 0.0), option("b", 0.8, 20, 1.1, 0.0)]
    assert choose(found, never, {}).name == "b"
    found.append(option("c", 0.85, 20, 1.2, 0.0))
    best = choose(found, never, {})
    assert best.name == "c" and "3 of 3 pass the gate" in best.reason


def test_where_none_passes_the_nearest_is_named() -> None:
    found = [option("a", 0.9, 30, 1.0, 0.2, 0.1), option("b", 0.8, 20, 2.0, 0.25, 0.0)]
    best = choose(found, by_name, {})
    assert (best.name, best.nearest) == ("", "b")
    assert "none passes" in best.reason and "missed 0.25" in best.reason
    found.append(option("c", 0.8, 20, 3.0, 0.24, 0.0))
    assert choose(found, by_name, {}).nearest == "c"


def test_with_a_budget_the_best_is_picked_and_without_anything_none() -> None:
    kept = [Option(n, q, 10, 1.0, budgeted=b) for n, q, b in
            (("a", 0.8, True), ("b", 0.9, True), ("c", 0.99, False))]  # fmt: skip
    best = choose(kept, never, {"b": "90 %"})
    assert best.name == "b" and "target.budget" in best.reason and "90 %" in best.reason
    bare = choose([option("a", 0.8, 1, 1.0), option("b", 0.9, 2, 2.0)], never, {})
    assert bare.name == "" and "neither gates nor a budget" in bare.reason
    assert choose([option("a", 0.8, 1, 1.0)], never, {}).name == "a"


def test_the_front_does_not_depend_on_the_order() -> None:
    figures = {"a": (0.7, 5, 1.0), "b": (0.9, 9, 1.5), "c": (0.8, 7, 2.5), "d": (0.9, 8, 3.0)}
    found = [option(name, *figure) for name, figure in figures.items()]
    fronts = [sorted(front(found[i:] + found[:i], by_name)) for i in range(len(found))]
    assert all(a == b for a, b in pairwise(fronts)) and fronts[0] == ["a", "b", "c", "d"]
