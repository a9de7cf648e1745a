"""A recipe's `finetune` that can't be: one clear error before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text
from tiny_run import events, write_recipe
from tuning.opening import TAUGHT, opened

from slimfuse.data import DataSet, Split
from slimfuse.errors import DataError, RecipeError, ShapeError, UserError
from slimfuse.pipeline import checks
from slimfuse.recipe import load_recipe
from slimfuse.tasks import TASKS


@pytest.mark.parametrize(
    ("package", "changes"),
    [("tensorboard", {"runtime": {"tensorboard": True}}), ("peft", {"finetune": {"lora": {}}})],
)
def test_a_missing_extra_is_one_clear_error_before_any_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, changes: Any
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(UserError, match=f"{package} isn't installed") as caught:
        opened(home, tmp_path / package, **changes)
    assert "pip install 'slimfuse[" in str(caught.value)


@pytest.mark.parametrize(("kind", "least"), [("regression", 4), ("single", 1)])
def test_too_few_held_out_samples_are_refused(kind: Any, least: int) -> None:
    split = Split(["a"] * 9, np.zeros(9))
    data = DataSet("x", split, split, ("number",), "mark", kind=kind)
    checks.check_samples(TASKS["text-classification"], data, None, least)
    with pytest.raises(DataError, match="too few training samples are held out") as caught:
        checks.check_samples(TASKS["text-classification"], data, None, least - 1)
    assert caught.value.where == "finetune.validation.share"


def test_hidden_states_need_parents_that_are_large_enough(home: Path, tmp_path: Path) -> None:
    changes = {
        "fuse": {"method": "random", "parents": ["slim"]},
        "target": {"hidden_size": 14, "num_attention_heads": 2, "intermediate_size": 16},
        "finetune": {"distill": TAUGHT},
    }
    with pytest.raises(ShapeError, match="hidden_size of the target is larger"):
        opened(home, tmp_path / "large", **changes)


def test_only_starts_without_maps_ask_for_them(home: Path, tmp_path: Path) -> None:
    stages = opened(home, tmp_path / "asks", finetune={"distill": TAUGHT})
    stages.finetune("fused")
    assert "streams" not in events(tmp_path / "asks", "start")
    stages.finetune("random-start")
    assert "streams" in events(tmp_path / "asks", "start")


def test_a_missing_compiler_is_told_before_any_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"torch finds no C\+\+ compiler") as caught:
        opened(home, tmp_path / "compiled", finetune={"compile": True})
    assert caught.value.where == "finetune.compile"


REFUSED = {
    "accumulate": (
        {"task": "sentence-embedding", "finetune": {"accumulate": 2}},
        "compares all samples of a step",
    ),
    "mixup": ({"finetune": {"mixup": 0.2}}, "blends pictures"),
    "cutmix": ({"finetune": {"cutmix": 1.0}}, "blends pictures"),
    "confident": (
        {"task": "sentence-embedding", "finetune": {"distill": {"combine": "confident"}}},
        "needs answers that are classes",
    ),
    "share": ({"finetune": {"validation": {"share": 0.6}}}, "share"),
    "every": ({"finetune": {"validation": {"every": 0}}}, "every"),
    "decay": ({"finetune": {"layer_decay": 1.5}}, "layer_decay"),
    "schedule": ({"finetune": {"schedule": "cosin"}}, "cosine"),
    "hidden": ({"finetune": {"distill": {"hidden": -1}}}, "hidden"),
}


@pytest.mark.parametrize(("changes", "told"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_its_line(
    home: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    content = tiny_text.recipe(home / "data", [home / "texts"], **changes)
    path = write_recipe(tmp_path / "r.yaml", content)
    with pytest.raises(RecipeError, match=told):
        load_recipe(path)
