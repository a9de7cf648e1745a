"""Starts that are refused, with the key to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from starts.looking import ANCHOR, HALF, MIXED, SAME, TWINS
from tiny_run import save_parent

from slimfuse.errors import ParentError, ShapeError, UserError
from slimfuse.families import ViT
from slimfuse.fuse.refit import Parent, Settings, refit


@pytest.mark.parametrize(
    ("fuse", "target", "parents", "words"),
    [
        ({"method": "vanilla"}, HALF, TWINS, "vanilla averages parents of one shape, the target's"),
        ({"method": "vanilla"}, SAME, MIXED, "vanilla averages parents of one shape"),
        ({"method": "gauge"}, HALF, MIXED, "gauge averages parents of one shape"),
        ({"method": "ot", "ot": ANCHOR}, {**HALF, "num_hidden_layers": 2}, MIXED,
         "moves parents of the target's depth"),
        ({"method": "ot", "ot": ANCHOR}, SAME, TWINS, "anchor is not of the target's shape"),
        ({"method": "subclone"}, {**HALF, "num_hidden_layers": 3}, MIXED, "a has too few"),
        ({"method": "select"}, {**HALF, "num_hidden_layers": 3}, MIXED, "a has too few"),
        ({"parents": ["a"]}, {**HALF, "hidden_size": 22},
         [{"name": "a", "from": "slim"}, {"name": "b", "from": "wide"}], "fuse.parents"),
    ],
)  # fmt: skip
def test_shapes_that_a_method_cannot_take(
    stages: Any, fuse: dict[str, Any], target: Any, parents: Any, words: str
) -> None:
    with pytest.raises(ShapeError) as error:
        stages(fuse, target, parents=parents)
    told = str(error.value)
    assert words in told and "got:" in told and str(error.value.where).startswith("fuse.")
    assert error.value.hint is not None or error.value.allowed is not None


@pytest.mark.parametrize(
    ("fuse", "parents", "words", "where"),
    [
        ({"method": "gauge"}, ["odd", "slim"], "a has them in another order", "fuse.method"),
        ({"method": "gauge"}, ["low", "high"], "a knows 5 of 10; b knows 5 of 10", "fuse.method"),
        ({"method": "select"}, ["low", "high"], "a knows 5 of 10", "fuse.method"),
        ({"method": "ot", "ot": {"anchor": {"from": "odd"}}}, ["slim", "twin"],
         "10: 9, 8, 7", "fuse.ot.anchor"),
    ],
)  # fmt: skip
def test_classes_that_a_method_cannot_take(
    stages: Any, fuse: dict[str, Any], parents: list[str], words: str, where: str
) -> None:
    listed = [{"name": n, "from": f} for n, f in zip("ab", parents, strict=True)]
    target = SAME if "ot" in fuse else HALF
    with pytest.raises(ParentError) as error:
        stages(fuse, target, parents=listed)
    assert words in str(error.value.got) and error.value.where == where


def test_teachers_that_do_not_know_all_classes(stages: Any) -> None:
    parents = [{"name": "a", "from": "low"}, {"name": "b", "from": "high"}]
    with pytest.raises(ParentError) as error:
        stages({}, parents=parents, finetune={"distill": {"teachers": ["a"]}})
    assert error.value.where == "finetune.distill.teachers"


def test_a_baseline_without_its_anchor_is_refused(stages: Any) -> None:
    with pytest.raises(ParentError, match="none is given") as error:
        stages({}, baselines=["random", "ot"])
    assert error.value.where == "baselines" and "fuse.ot.anchor" in str(error.value.hint)


def test_an_anchor_with_other_preprocessing_is_refused(stages: Any, zoo: Path) -> None:
    folder = save_parent(zoo / "tilted", hidden_size=8, intermediate_size=12)
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    with pytest.raises(ParentError, match="prepare images differently") as error:
        stages({"method": "ot", "ot": {"anchor": {"from": "tilted"}}})
    assert "anchor has False" in str(error.value.got)


@pytest.mark.parametrize("key", ["stream", "units"])
def test_a_softness_that_cannot_be_had_is_the_recipes_error(stages: Any, key: str) -> None:
    made = stages({key: "ot", "ot": {"solver": "sinkhorn", "effective_units": 1000.0}})
    with pytest.raises(UserError, match="can't be solved as asked"):
        made.start("fused")


def test_a_parent_that_says_nothing_is_refused(zoo: Path, tmp_path: Path) -> None:
    family = ViT()
    good, dead = (family.load(zoo / "slim") for _ in range(2))
    with torch.no_grad():
        for p in dead.parameters():
            p.zero_()
    target = family.build(good.config)
    pixels = torch.randn(40, 3, *[good.config.image_size] * 2)
    with pytest.raises(ParentError, match="nought"):
        refit([Parent("a", good), Parent("b", dead)], target, family, lambda: [pixels],
              Settings(), n_batches=1)  # fmt: skip
    with torch.no_grad():
        dead.classifier.bias[0] = float("nan")
    dead.save_pretrained(tmp_path / "nan")
    with pytest.raises(ParentError, match="nan or inf") as caught:
        family.load(tmp_path / "nan")
    assert "classifier.bias" in str(caught.value.got)
