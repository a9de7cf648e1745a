"""Recipes nobody would write: each is valid or refused with one clear error."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slimfuse.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The maker and judge of benchmarks/fuzz.py, which makes 100 000."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("fuzz_recipes")


def _judged(fuzz: Any, tmp_path: Path, numbers: range, seed: int) -> Counter[tuple[str, bool]]:
    found: Counter[tuple[str, bool]] = Counter()
    for number in numbers:
        one = fuzz.example(seed, number)
        try:
            answer = fuzz.judge(one, tmp_path / "recipe.yaml")
        except Exception as error:
            raise AssertionError(f"example {number} of seed {seed}, {one.kind}") from error
        found[one.kind, answer == "valid"] += 1
    assert [f.name for f in tmp_path.iterdir()] == ["recipe.yaml"]
    return found


def test_odd_recipes_are_valid_or_refused_with_one_error(fuzz: Any, tmp_path: Path) -> None:
    found = _judged(fuzz, tmp_path, range(200), seed=1)
    # both answers are met, else the judge sees nothing
    assert found["shipped, mutated", True] > 5 and found["from the schema", True] > 3
    assert {kind for kind, valid in found if not valid} == set(fuzz.MAKERS)


@pytest.mark.slow
def test_thousands_of_odd_recipes(fuzz: Any, tmp_path: Path) -> None:
    _judged(fuzz, tmp_path, range(10_000), seed=2)


def test_an_example_is_the_same_every_time(fuzz: Any) -> None:
    assert [fuzz.example(3, n) for n in range(30)] == [fuzz.example(3, n) for n in range(30)]
    assert len({fuzz.example(3, n).content for n in range(30)}) > 20


def test_the_judge_sees_a_fault_a_long_message_and_one_without_a_place(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(error: Exception) -> None:
        def load(*_: object) -> None:
            raise error

        monkeypatch.setattr(fuzz, "load_recipe", load)

    one, path = fuzz.Example("bombs", b"x"), tmp_path / "recipe.yaml"
    raising(UserError("a mistake of the recipe", where="r.yaml:1"))
    assert fuzz.judge(one, path) == "refused: a mistake of the"
    for bad in (
        UserError("x" * 5000, where="r.yaml:1"),
        UserError("a mistake of the recipe"),
        UserError("a mistake\n\n\nof the recipe", where="r.yaml:1"),
        UserError("a mistake \x1b[31m of the recipe", where="r.yaml:1"),
    ):
        raising(bad)
        with pytest.raises(AssertionError):
            fuzz.judge(one, path)
    raising(TypeError("unhashable"))
    with pytest.raises(TypeError):
        fuzz.judge(one, path)
