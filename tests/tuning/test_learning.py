"""A recipe's `finetune` put to the loop: hidden states, held-out samples, the log."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from safetensors.torch import load_file
from tiny_run import events, folder_bytes, write_recipe
from torch import Tensor
from tuning.opening import TAUGHT, opened

from slimfuse.errors import Terminated
from slimfuse.finetune import loop
from slimfuse.interrupt import terminate
from slimfuse.pipeline import held_out, journal, lessons, streams, tuning
from slimfuse.pipeline.fusion_record import STREAMS_FILE
from slimfuse.pipeline.held_out import parts
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.stages import Stages, training_of
from slimfuse.recipe import Validation, load_recipe
from slimfuse.store import Store


def taught(stages: Stages, start: str = "fused") -> tuple[Any, Any]:
    """Return what a start's hidden states shall be, and its model."""
    made = stages.start(start)
    model = stages.job.family.load(made.path, attention="eager")
    return streams.taught(stages, made, model, stages.samples("train")), model


def distance(stages: Stages, hidden: Any, model: Any) -> float:
    loss = tuning.distillation_loss(
        stages.job.task, stages.fetch(stages.samples("train")), stages.teaching.targets(hidden),
        temperature=1.0, hardness=0.0, hidden=hidden,
    )  # fmt: skip
    plain = tuning.distillation_loss(
        stages.job.task, stages.fetch(stages.samples("train")), stages.teaching.targets(),
        temperature=1.0, hardness=0.0,
    )  # fmt: skip
    some = torch.arange(40)
    with torch.no_grad():
        return float(loss(model, some) - plain(model, some))


def test_a_refit_brings_its_maps_and_others_are_turned_to_theirs(
    home: Path, tmp_path: Path
) -> None:
    stages = opened(home, tmp_path / "maps", finetune={"distill": TAUGHT})
    hidden, model = taught(stages)
    assert (stages.start("fused").path / STREAMS_FILE).is_file() and hidden.turn is None
    assert [len(s.depths) for s in hidden.sources] == [2, 2]
    assert hidden.sources[1].depths[-1] == 3  # the deeper parent's end
    near = distance(stages, hidden, model)
    other, random = taught(stages, "random-start")
    assert other.turn is not None
    torch.testing.assert_close(other.turn @ other.turn.T, torch.eye(8), rtol=0, atol=1e-5)
    far = distance(stages, other, random)
    assert 0 < near < 0.5 < far
    assert far < distance(stages, replace(other, turn=None), random)


def test_training_brings_the_hidden_states_nearer(home: Path, tmp_path: Path) -> None:
    settings = {"epochs": 3, "lr": 2e-3, "batch_size": 32}
    with_them = opened(home, tmp_path / "with", finetune={**settings, "distill": {"hidden": 3.0}})
    without = opened(home, tmp_path / "without", finetune=settings)
    hidden, start = taught(with_them)
    found = [distance(with_them, hidden, start)]
    for stages in (with_them, without):
        made = stages.finetune("fused")
        model = stages.job.family.load(made.path, attention="eager")
        found.append(distance(with_them, hidden, model))
    assert found[1] < found[0] and found[1] < found[2]


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_what_is_kept_is_what_the_parents_say(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(lessons, "SHARD", 16)  # several files
    if kind == "images":
        stages = opened(home, tmp_path / kind, finetune={"epochs": 2, "distill": TAUGHT})
    else:
        content = tiny_text.recipe(home / "data", [home / "texts"])
        content["finetune"] = {"epochs": 2, "distill": TAUGHT}
        path = write_recipe(home / "texts.yaml", content)
        stages = Stages(prepare(load_recipe(path), path), Store(tmp_path))
    hidden, _ = taught(stages)
    samples, task = stages.samples("train"), stages.job.task
    some = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:23]
    inputs, labels = task.examples(samples, some)
    kept = stages.teaching.targets(hidden)(some, inputs, labels)
    files = list(stages.store.root.glob("stages/hidden-states-*/*.safetensors"))
    assert len(files) == -(-len(samples) // 16)
    monkeypatch.setattr(lessons, "LIMIT", 0)
    live = stages.teaching.targets(hidden)(some, inputs, labels)
    mask = inputs.arguments.get("attention_mask", torch.ones(kept.streams[0].shape[:2])).bool()
    assert len(kept.streams) == len(hidden.blocks)
    for one, other in zip(kept.streams, live.streams, strict=True):
        torch.testing.assert_close(one[mask], other[mask], rtol=2**-7, atol=1e-2)
        assert not one[~mask].any()
    torch.testing.assert_close(kept.rows, live.rows, rtol=1e-4, atol=1e-5)


def test_hidden_states_are_not_kept_where_samples_come_once(home: Path, tmp_path: Path) -> None:
    stages = opened(home, tmp_path / "once", finetune={"epochs": 1, "distill": TAUGHT})
    stages.finetune("fused")
    assert "hidden-states" not in events(tmp_path / "once", "start")


def test_held_out_samples_are_never_learnt_from(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"share": 0.2, "every": 2}
    stages = opened(home, tmp_path / "held", finetune={"epochs": 3, "validation": spec})
    asked: list[Tensor] = []
    measured: list[Tensor] = []
    real = tuning.distillation_loss

    def watched(*args: Any, **more: Any) -> Any:
        loss = real(*args, **more)
        return lambda model, indices: (asked.append(indices), loss(model, indices))[1]

    monkeypatch.setattr(tuning, "distillation_loss", watched)
    reduce = type(stages.job.task).reduce

    def noted(self: Any, output: Tensor, inputs: Any, labels: Tensor) -> Any:
        measured.append(labels)
        return reduce(self, output, inputs, labels)

    for parent in stages.job.teachers:
        stages.outputs(parent)  # their answers are no measurements of the child
    stages.start("fused")
    monkeypatch.setattr(type(stages.job.task), "reduce", noted)
    made = stages.finetune("fused")
    seed = stages.recipe.finetune.seed
    places = parts(150, stages.recipe.finetune.validation, seed)
    assert len(places.held_out) == 30 and len(places.learnt) == 120
    assert sorted([*places.held_out.tolist(), *places.learnt.tolist()]) == list(range(150))
    assert set(torch.cat(asked).tolist()) == set(places.learnt.tolist())
    steps = len(json.loads((made.path / "losses.json").read_text()))
    assert steps == 3 * 4 == stages.tuning.schedule.steps  # epochs of what is learnt from
    train = stages.samples("train").labels
    assert sum(len(m) for m in measured) == 30 * (steps // 2)
    assert torch.cat(measured[: len(measured) // (steps // 2)]).bincount().tolist() == (
        train[places.held_out].bincount().tolist()
    )
    lines = [json.loads(x) for x in (tmp_path / "held" / "log.jsonl").read_text().splitlines()]
    seen = [x for x in lines if x["event"] == "step" and x["stage"] == "finetuned"]
    assert [x["step"] for x in seen if "validation" in x] == list(range(2, steps + 1, 2))
    assert {"loss", "rate", "norm", "time"} <= seen[0].keys()


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
@pytest.mark.parametrize("share", [0.001, 0.5])
def test_both_sides_have_samples_where_there_are_two(count: int, share: float) -> None:
    found = parts(count, Validation(share=share), 0)
    assert len(found.learnt) + len(found.held_out) == count and len(found.learnt) >= 1
    assert (len(found.held_out) >= 1) == (count > 1)
    assert held_out.learnt(count, None) == count


def test_without_labels_the_loss_itself_is_held_out(home: Path, tmp_path: Path) -> None:
    content = tiny_text.recipe(home / "data", [home / "texts"], task="sentence-embedding")
    content["finetune"] = {"epochs": 2, "batch_size": 16, "validation": {"every": 3}}
    path = write_recipe(home / "embed.yaml", content)
    stages = Stages(prepare(load_recipe(path), path), Store(tmp_path))
    stages.finetune("fused")
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    values = [x["validation"] for x in lines if "validation" in x]
    assert len(values) >= 2 and all(0 < v < 10 for v in values)


def test_the_surest_teacher_speaks(home: Path, tmp_path: Path) -> None:
    stages = opened(home, tmp_path / "sure", finetune={"distill": {"combine": "confident"}})
    some = torch.arange(30)
    inputs, labels = stages.job.task.examples(stages.samples("train"), some)
    said = stages.teaching.targets()(some, inputs, labels).rows
    answers = []
    for parent in stages.job.teachers:
        model = stages.job.family.load(stages.parent(parent)[0])
        with torch.no_grad():
            answers.append(model(**inputs.arguments).logits)
    sure = torch.stack([a.softmax(1).amax(1) for a in answers]).argmax(0)
    soft = torch.stack([(a / 2).softmax(1) for a in answers])
    assert 0 < int(sure.sum()) < 30  # each is the surer one at times
    torch.testing.assert_close(said, soft[sure, some], rtol=1e-3, atol=1e-4)


def test_sigterm_saves_and_the_same_command_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"finetune": {"epochs": 3, "distill": TAUGHT}}
    want = opened(home, tmp_path / "whole", **settings).finetune("fused")
    before = signal.signal(signal.SIGTERM, terminate)
    real, calls = tuning.distillation_loss, iter(range(5))

    def told(*args: Any, **more: Any) -> Any:
        loss = real(*args, **more)

        def stopping(model: Any, indices: Tensor) -> Tensor:
            if next(calls, None) is None:
                signal.raise_signal(signal.SIGTERM)
            found: Tensor = loss(model, indices)
            return found

        return stopping

    try:
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "distillation_loss", told)
            with pytest.raises(Terminated):
                opened(home, tmp_path / "cut", **settings).finetune("fused")
    finally:
        signal.signal(signal.SIGTERM, before)
    (file,) = (tmp_path / "cut" / "stages").glob("finetuned-*.partial/checkpoint.safetensors")
    assert len(load_file(file)["history"]) == 6  # its step, too
    got = opened(home, tmp_path / "cut", **settings).finetune("fused")
    one, two = folder_bytes(want.path), folder_bytes(got.path)
    assert one["model.safetensors"] == two["model.safetensors"]
    assert one["losses.json"] == two["losses.json"]


def test_curves_are_written_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard" / "finetuned") and purge_step == 4

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    monkeypatch.setattr(journal, "summary_writer", lambda: Writer)
    with journal.Journal(Store(tmp_path), "finetuned", curves=True) as log:
        log(4, {"loss": float("nan"), "rate": 0.5})
        log(5, {"loss": 1.0, "rate": 0.25})
    assert written == [("rate", 0.5, 4), ("loss", 1.0, 5), ("rate", 0.25, 5), ("closed", 0.0, 0)]
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(x["step"], x.get("loss")) for x in lines] == [(4, None)]  # the next is too soon


def test_adapters_are_merged_and_gone(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = {"epochs": 3, "lr": 1e-2}
    stages = opened(home, tmp_path / "lora", finetune={**settings, "lora": {"rank": 2}})
    made, start = stages.finetune("fused"), stages.start("fused")
    before, after = (load_file(s.path / "model.safetensors") for s in (start, made))
    assert before.keys() == after.keys()  # a stock model again
    moved = {n for n, v in after.items() if not torch.equal(v, before[n])}
    kinds = {n for n in after if n.endswith("weight") and after[n].ndim == 2 and "layer" in n}
    assert moved == kinds | {"classifier.weight", "classifier.bias"}
    for name in kinds:  # of rank 2
        gap = (after[name] - before[name]).double()
        assert int(torch.linalg.matrix_rank(gap, rtol=1e-3)) <= 2, name
    model = stages.job.family.load(made.path)
    assert type(model).__name__ == "ViTForImageClassification"
    assert all(p.requires_grad for p in model.parameters())


def test_killed_with_adapters_it_ends_with_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    settings = {"finetune": {"epochs": 2, "lora": {"rank": 2}, "validation": {"every": 3}}}
    want = opened(home, tmp_path / "whole", **settings).finetune("fused")
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    left, real = iter(range(4)), tuning.distillation_loss

    def stopping(*args: Any, **more: Any) -> Any:
        loss = real(*args, **more)

        def stop(model: Any, indices: Tensor) -> Tensor:
            if next(left, None) is None:
                raise KeyboardInterrupt
            found: Tensor = loss(model, indices)
            return found

        return stop

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "distillation_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            opened(home, tmp_path / "cut", **settings).finetune("fused")
    got = opened(home, tmp_path / "cut", **settings).finetune("fused")
    assert (
        folder_bytes(want.path)["model.safetensors"] == folder_bytes(got.path)["model.safetensors"]
    )


def test_the_card_and_the_record_say_which_weights_were_chosen(home: Path, tmp_path: Path) -> None:
    spec = {"share": 0.2, "every": 2, "patience": 1}
    stages = opened(home, tmp_path / "early", finetune={"epochs": 4, "validation": spec})
    record = training_of(stages.finetune("fused"))
    lines = [json.loads(x) for x in (tmp_path / "early" / "log.jsonl").read_text().splitlines()]
    seen = [(x["validation"], x["step"]) for x in lines if "validation" in x]
    best = max(value for value, _ in seen)
    first = next(step for value, step in seen if value == best)
    assert record["chosen"] == {"step": first, "value": pytest.approx(best)}
    assert record["steps"] == seen[-1][1] and record["ended_early"] == (record["steps"] < 16)
