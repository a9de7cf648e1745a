"""The stages of a sparse child: every task, plain nets, interruption, method keep."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from safetensors.torch import load_file
from tiny_run import folder_bytes, recipe, save_parent, write_recipe
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.errors import ParentError, ShapeError, UserError
from slimfuse.families import ViT
from slimfuse.finetune import loop
from slimfuse.pipeline import plan, sparse, tuning
from slimfuse.pipeline.making import stages_of
from slimfuse.pipeline.run import prepared
from slimfuse.pipeline.sparse import RECORD, Thinned, Thinning, loss_of, recovery_steps
from slimfuse.recipe.loading import load_located
from slimfuse.saliency import sparsify as driver
from slimfuse.saliency.gradients import gradients
from slimfuse.saliency.masks import FILE, Masks
from slimfuse.store import MANIFEST, Store
from slimfuse.tasks import ImageClassification
from slimfuse.tasks.criteria import Direction, Numeric, Several

KEPT: dict[str, Any] = {"fuse": {"method": "keep"}, "target": {}}


def opened(path: Path, out: Path, *overrides: str) -> Any:
    job = prepared(load_located(path, overrides), path)
    return stages_of(job, Store(out))


def thinned(stages: Any, scorer: str | None = None) -> Thinned:
    spec = stages.recipe.sparsify
    dense = stages.finetune("fused")
    return Thinning(stages, spec, scorer or spec.scorer).make(dense)


# ---- every task


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    tiny_text.save_texts(folder / "labelled", (60, 45))
    tiny_text.save_parent(folder / "bert")
    save_parent(folder / "vit")
    (folder / "prose").mkdir()
    draw = random.Random(0)
    for name in ("train", "test"):
        lines = [" ".join(draw.choices(tiny_text.FILLING, k=9)) for _ in range(60)]
        (folder / "prose" / f"{name}.txt").write_text("\n".join(lines))
    return folder


def content(home: Path, task: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe of a task that prunes a model as it is."""
    finetune = {"epochs": 0, "batch_size": 16}
    common = {**KEPT, "finetune": finetune, "sparsify": spec, "baselines": []}
    if task == "image-classification":
        return recipe(parents=[{"name": "a", "from": str(home / "vit")}]) | common
    if task == "nets":
        train = {"config": {"architecture": "vgg", "features": [3, "M", 4], "hidden": [5],
                            "batch_norm": True}, "epochs": 1, "batch_size": 32}  # fmt: skip
        parents = [{"name": "a", "train": train}]
        return recipe(family="auto", parents=parents) | common | {"fuse": {"method": "unfused"}}
    if task in ("text-classification", "sentence-embedding"):
        return tiny_text.recipe(home / "labelled", [home / "bert"], task=task) | common
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 24}  # fmt: skip
    made = tiny_text.recipe(
        home / "prose", [], task=task, family="gpt2" if task == "causal-lm" else "bert",
        parents=[{"name": "a", "train": {"config": shape, "epochs": 1, "batch_size": 16}}],
    )  # fmt: skip
    made["data"] |= {"vocabulary": 300, "max_length": 12}
    return made | common


@pytest.mark.parametrize(
    ("task", "fisher"),
    [("image-classification", "labels"), ("image-classification", "own-answers"),
     ("text-classification", "labels"), ("masked-lm", "own-answers"), ("masked-lm", "labels"),
     ("causal-lm", "own-answers"), ("sentence-embedding", "own-answers"), ("nets", "labels")],
)  # fmt: skip
def test_every_task_is_pruned(home: Path, tmp_path: Path, task: str, fisher: str) -> None:
    spec = {"sparsity": 0.6, "samples": 7, "micro_batch": 2, "block": 5, "epochs": 0.5}
    if fisher == "labels" and task == "masked-lm":  # not what null means there
        spec["fisher"] = fisher
    if fisher == "own-answers" and task == "image-classification":
        spec["fisher"] = fisher
    path = write_recipe(tmp_path / "r.yaml", content(home, task, spec))
    stages = opened(path, tmp_path / "run")
    assert sparse.fisher_of(stages.recipe.sparsify, stages.job.task) == fisher
    made = thinned(stages)
    masks = Masks.load(made.stage.path / FILE)
    total = sum(m.numel() for m in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.6 * total)
    assert made.record["gradients"] == 7 and made.record["steps"][0]["increase"] > 0
    masks.check(stages.job.family.load(made.stage.path))
    assert len(json.loads((made.stage.path / "losses.json").read_text())) == recovery_steps(
        stages.job, stages.recipe.sparsify
    ) > 0  # fmt: skip
    with pytest.raises(UserError, match="not zero"):  # the dense one has none
        masks.check(stages.job.family.load(stages.finetune("fused").path))
    assert stages.figures(stages.evidence(made.stage))
    child = plan(path).models[-1]
    assert child.steps == recovery_steps(stages.job, stages.recipe.sparsify)


class Rows(nn.Module):
    """A model of numbers whose answers are a matrix's rows."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, pixel_values: Tensor) -> Any:
        return type("Out", (), {"logits": self.rows[pixel_values[:, 0].long()]})


@pytest.mark.parametrize("criterion", [None, Several(), Numeric(), Direction()])
def test_gradients_of_own_answers_have_the_models_fisher(criterion: Any) -> None:
    """E ∇∇ᵀ over drawn answers is known of the logits themselves: Martens 2020, section 9."""
    task = ImageClassification()
    rows = torch.tensor([[0.3, -1.2, 0.8]])
    if criterion is not None:
        task.criterion = criterion
    if isinstance(criterion, Numeric):
        rows = rows[:, :1]
    model = Rows(rows)
    loss = loss_of(task, lambda i: (Batch({"pixel_values": torch.zeros(1, 1)}), i), "own-answers")
    places = [torch.tensor([0])] * 2000
    found = torch.cat([g["rows"][0] for g in gradients(model, loss, places, ["rows"], seed=3)])
    again = torch.cat([g["rows"][0] for g in gradients(model, loss, places, ["rows"], seed=3)])
    assert torch.equal(found, again)  # every pass sees the same answers
    p = rows[0].softmax(0)
    if isinstance(criterion, Several):
        p = rows[0].sigmoid()
        want = torch.diag(p * (1 - p))
    elif isinstance(criterion, Numeric):
        want = torch.ones(1, 1)
    elif isinstance(criterion, Direction):  # JᵀJ of f/|f|, J = (I − uuᵀ)/|f|
        unit = rows[0] / rows[0].norm()
        want = (torch.eye(3) - torch.outer(unit, unit)) / rows[0].norm() ** 2
    else:
        want = torch.diag(p) - torch.outer(p, p)
    # 2 000 draws: the standard error of a product of such gradients is below .025
    torch.testing.assert_close(found.T @ found / len(found), want, rtol=0, atol=0.1)


# ---- interruption


def counting(calls: Iterator[int], stops: set[int]) -> Callable[[], None]:
    def count() -> None:
        if next(calls) in stops:
            raise KeyboardInterrupt

    return count


def test_killed_anywhere_it_ends_with_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"sparsity": 0.7, "samples": 20, "steps": 2, "epochs": 2}
    made = content(home, "image-classification", spec) | {
        "finetune": {"epochs": 0, "batch_size": 32, "ema": 0.9}
    }
    path = write_recipe(tmp_path / "r.yaml", made)
    thinned(opened(path, tmp_path / "whole"))
    for owner in (loop, driver):
        monkeypatch.setattr(owner, "CHECKPOINT_SECONDS", 0.0)
    train_calls, gradient_calls = iter(range(999)), iter(range(999))
    # in the first pass, the recovery between, the second pass, the last recovery
    stop_train = counting(train_calls, {3, 8})
    stop_gradient = counting(gradient_calls, {12, 40})

    def wrapped(make: Callable[..., Any], stop: Callable[[], None]) -> Callable[..., Any]:
        def making(*args: Any, **kwargs: Any) -> Any:
            loss = make(*args, **kwargs)

            def stopping(*given: Any) -> Any:
                stop()
                return loss(*given)

            return stopping

        return making

    monkeypatch.setattr(tuning, "distillation_loss", wrapped(tuning.distillation_loss, stop_train))
    monkeypatch.setattr(sparse, "loss_of", wrapped(sparse.loss_of, stop_gradient))
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            thinned(opened(path, tmp_path / "cut"))
    last = thinned(opened(path, tmp_path / "cut"))
    # nothing that was done is done again: 10 steps of training, two of them cut short
    assert next(train_calls) == 12
    assert next(gradient_calls) == 13 + 20 + 8 + 20  # a pass that was cut short begins again
    one, two = (folder_bytes(tmp_path / name / "stages") for name in ("whole", "cut"))
    assert [k for k in one if not k.endswith(MANIFEST) and one[k] != two.get(k)] == []
    assert not [name for name in two if "checkpoint" in name]
    assert [step["step"] for step in last.record["steps"]] == [1, 2]
    masks = Masks.load(last.pruned.path / FILE)
    before, after = (ViT().load(s.path).state_dict() for s in (last.pruned, last.stage))
    for name, mask in masks.items():
        assert torch.equal(after[name] == 0, ~mask) and not torch.equal(before[name], after[name])


def test_a_change_repeats_what_depends_on_it(home: Path, tmp_path: Path) -> None:
    spec = {"sparsity": 0.7, "samples": 5, "epochs": 0.2, "scorer": "diagonal-fisher"}
    path = write_recipe(tmp_path / "r.yaml", content(home, "image-classification", spec))

    def keys(*overrides: str) -> tuple[str, str]:
        made = thinned(opened(path, tmp_path / "run", *overrides))
        return made.pruned.key, made.stage.key

    pruned, trained = keys()
    assert keys() == keys("sparsify.controls=[random]") == (pruned, trained)
    longer = keys("sparsify.epochs=0.6")
    assert longer[0] == pruned and longer[1] != trained
    for override in ("sparsify.samples=6", "sparsify.damping=1", "runtime.seed=1",
                     "sparsify.sparsity=0.6", "sparsify.leave_out=['classifier.*']"):  # fmt: skip
        assert keys(override)[0] != pruned


# ---- what can't be pruned, and method keep


@pytest.mark.parametrize(
    ("override", "error", "where"),
    [("sparsify.layers=[nothing]", UserError, "sparsify.layers"),
     ("sparsify={pattern: '2:4'}", ShapeError, "sparsify.pattern")],
)  # fmt: skip
def test_layers_are_checked_before_any_work(
    home: Path, tmp_path: Path, override: str, error: type[UserError], where: str
) -> None:
    path = write_recipe(
        tmp_path / "r.yaml", content(home, "image-classification", {"sparsity": 0.5})
    )
    with pytest.raises(error) as caught:
        plan(path, overrides=(override,))
    assert str(caught.value.where).endswith(where)
    if error is ShapeError:
        assert "patch_embeddings" in str(caught.value.hint)
        assert "q_proj" not in str(caught.value.hint)
        assert plan(path, overrides=(override, str(caught.value.hint)[7:-1])).notes


def test_keep_takes_the_parent_that_is_named_as_it_is(saved_parents: Path, tmp_path: Path) -> None:
    parents = [{"name": n, "from": str(saved_parents / n)} for n in ("wide", "slim")]
    finetune = {"finetune": {"epochs": 0}}
    made = recipe(parents=parents) | finetune | KEPT
    path = write_recipe(tmp_path / "r.yaml", made)
    for name in ("wide", "slim"):
        stages = opened(path, tmp_path / name, f"fuse.parents=[{name}]")
        start = load_file(stages.start("fused").path / "model.safetensors")
        own = load_file(saved_parents / name / "model.safetensors")
        assert start.keys() == own.keys()
        assert all(torch.equal(start[k], own[k]) for k in own)
    # the first of those that are fused, as the recipe lists them, however wide
    turned = write_recipe(tmp_path / "t.yaml", made | {"parents": parents[::-1]})
    assert plan(turned).models[-1].shape == plan(path, overrides=("fuse.parents=[slim]",)).models[
        -1
    ].shape  # fmt: skip


def test_keep_needs_the_targets_shape_and_classes(saved_parents: Path, tmp_path: Path) -> None:
    parents = [{"name": "wide", "from": str(saved_parents / "wide")}]
    path = write_recipe(tmp_path / "r.yaml", recipe(parents=parents, fuse={"method": "keep"}))
    with pytest.raises(ShapeError, match="keep takes the first parent as it is") as caught:
        plan(path)
    assert "24 wide" in str(caught.value.allowed) and "12 wide" in str(caught.value.got)
    turned = [str(i) for i in range(10)][::-1]
    save_parent(tmp_path / "turned", labels=turned)
    other = {"name": "turned", "from": str(tmp_path / "turned")}
    path = write_recipe(tmp_path / "r.yaml", recipe(parents=[*parents, other]) | KEPT)
    with pytest.raises(ParentError, match="must know all of the data's classes, in its order"):
        plan(path, overrides=("fuse.parents=[turned]",))


def test_a_record_is_plain(home: Path, tmp_path: Path) -> None:
    spec = {"scorer": "magnitude", "sparsity": 0.5, "leave_out": ["classifier.*"]}
    path = write_recipe(tmp_path / "r.yaml", content(home, "image-classification", spec))
    made = thinned(opened(path, tmp_path / "run"))
    record = json.loads((made.pruned.path / RECORD).read_text())
    assert record["gradients"] == 0 and record["steps"][0]["increase"] is None
    assert all("classifier" not in layer["name"] for layer in record["layers"])
