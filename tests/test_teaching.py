"""Teachers that are asked in every step: loaded once, united in float32, gone afterwards."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from tiny_run import write_recipe

from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.stages import Stages
from slimfuse.pipeline.teaching import answer
from slimfuse.recipe import load_recipe
from slimfuse.store import Store


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two sentence encoders and one epoch, so that nothing of the teachers is kept."""
    home = tmp_path_factory.mktemp("teaching")
    tiny_text.save_texts(home / "data", (60, 40))
    folders = [tiny_text.save_parent(home / name, seed=i) for i, name in enumerate("ab")]
    content = tiny_text.recipe(
        home / "data", folders, task="sentence-embedding",
        finetune={"epochs": 1, "batch_size": 16},
        runtime={"threads": 1, "precision": "bf16"},
    )  # fmt: skip
    path = write_recipe(home / "r.yaml", content)
    return prepare(load_recipe(path), path)


def test_teachers_are_loaded_once_for_a_training_and_then_freed(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(job, Store(tmp_path))
    assert not stages.teaching.cached
    stages.start("fused")
    folders = {stages.parent(t)[0] for t in job.teachers}
    loaded: list[weakref.ref[Any]] = []
    kind: Any = type(job.family)
    load = kind.load

    def watched(self: Any, folder: Any, **options: Any) -> Any:
        model = load(self, folder, **options)
        if folder in folders:
            loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(kind, "load", watched)
    stages.finetune("fused")
    assert len(loaded) == len(job.teachers) == 2
    gc.collect()
    assert [ref() for ref in loaded] == [None, None]


def test_what_teachers_say_together_is_of_float32(job: Job, tmp_path: Path) -> None:
    """Amid a training in bf16 they answer in it, which is known to 8 bits."""
    stages = Stages(job, Store(tmp_path))
    teach, samples = stages.teaching.targets(), stages.samples("train")
    some = torch.arange(9)
    inputs, labels = job.task.examples(samples, some)
    want = teach(some, inputs, labels).rows
    with torch.autocast("cpu", torch.bfloat16):
        got = teach(some, inputs, labels).rows
        assert torch.is_autocast_enabled("cpu")
    assert want.dtype == got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=2**-6)  # a few roundings of numbers below 1
    torch.testing.assert_close(got.norm(dim=1), torch.ones(9), rtol=0, atol=1e-6)


def test_only_models_with_classes_are_united(job: Job, tmp_path: Path) -> None:
    """A union reads what enters the head, and a body has none."""
    stages = Stages(job, Store(tmp_path))
    assert job.family.layout(job.parents[0].config).head == ""
    assert not stages.teaching.mixed(job.parents)
    model = job.family.load(stages.parent(job.parents[0])[0])
    with pytest.raises(AssertionError, match="those have a head"):
        answer(model, job.family.layout(job.parents[0].config), job.example)
