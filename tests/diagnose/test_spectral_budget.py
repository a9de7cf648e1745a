"""`target.budget.allocation: spectrum`: what the spectra say a size is worth, and when not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from saliency.test_budget_split import SAVED, copied, dead, made, saved
from tiny_run import recipe, write_recipe

from slimfuse.diagnose.spectrum import TRUST, Spectrum, by_value
from slimfuse.errors import ShapeError
from slimfuse.families import ViT
from slimfuse.pipeline import plan
from slimfuse.recipe import InvalidRecipe, load_recipe
from slimfuse.shapes import Budget, Meter


def target(params: float = 0.65, **keys: Any) -> dict[str, Any]:
    return {"budget": {"params": params, "allocation": "spectrum", **keys}}


def quiet(model: Any) -> None:
    """Let answers hardly depend on anything, so that nothing that is lost matters."""
    copied(model)
    model.classifier.weight.mul_(1e-3)


def test_a_value_costs_the_tails_of_its_rank() -> None:
    two = [Spectrum(n, torch.tensor([4.0, 2.0, 1.0, 1.0]), 4, 9) for n in "ab"]
    assert by_value(two, [0, 2, 4]) == [8.0, 2.0, 0.0]


@pytest.mark.parametrize("change", [dead, copied])
def test_what_an_mlp_says_twice_or_not_at_all_goes_first(change: Any, tmp_path: Path) -> None:
    def alike(model: Any) -> None:
        change(model)
        model.classifier.weight.mul_(1e-3)

    saved(tmp_path / "a", alike)
    found = made(tmp_path, target()).proposal
    plain = made(tmp_path, {"budget": {"params": 0.65}}).proposal
    assert found.shape.hidden_size == 32 > plain.shape.hidden_size
    assert found.shape.intermediate_size < plain.shape.intermediate_size
    meter = Meter(ViT().load_config(str(tmp_path / "a")), ViT())
    assert meter.meets(Budget("params", 0.65), found.shape)
    assert "a says what each size is worth" in found.notes[-2]
    assert "inside the trust region" in found.notes[-1]


def test_outside_the_trust_region_all_shrink_by_one_share(tmp_path: Path) -> None:
    def loud(model: Any) -> None:
        model.classifier.weight.mul_(100)

    saved(tmp_path / "a", loud)
    found = made(tmp_path, target(0.3)).proposal
    plain = made(tmp_path, {"budget": {"params": 0.3}}).proposal
    assert found.shape == plain.shape
    assert f"outside the trust region ({TRUST} nats)" in found.notes[-1]


def test_it_is_the_same_each_time(tmp_path: Path) -> None:
    saved(tmp_path / "a", quiet)
    one, two = (made(tmp_path, target()).proposal for _ in range(2))
    assert one == two


def test_spectra_say_nothing_of_blocks(tmp_path: Path) -> None:
    free = ["hidden_size", "num_hidden_layers"]
    path = write_recipe(tmp_path / "x.yaml", recipe() | {"target": target(free=free)})
    with pytest.raises(InvalidRecipe, match="doesn't say what a block is worth") as error:
        load_recipe(path)
    assert error.value.problems[0].loc == ("target", "budget", "free")
    load_recipe(path, ("target.budget.allocation=saliency",))


def test_neither_an_untrained_parent_nor_an_outline_has_spectra(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "x.yaml", {**recipe(), "target": target()})
    with pytest.raises(ShapeError, match="spectrum needs the largest parent's weights"):
        plan(path)
    saved(tmp_path / "a")
    path = write_recipe(tmp_path / "y.yaml", {**recipe(parents=SAVED), "target": target()})
    with pytest.raises(ShapeError, match="spectrum is of a parent's weights"):
        plan(path, outline=True)
