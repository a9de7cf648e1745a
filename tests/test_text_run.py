"""A whole run on texts: from saved BERTs and CSV files to a folder that stock tools open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_text
import torch
from safetensors.torch import load_file
from tiny_run import parents_unexported, unproved, write_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from slimfuse import compress
from slimfuse.errors import UserError
from slimfuse.pipeline import Run, plan
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.package import model_card
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.stock import verify
from slimfuse.store import Store
from slimfuse.tasks import CausalLanguageModelling, Measured, TextTask
from slimfuse.tasks.text_classification import Tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    tiny_text.save_texts(folder / "data")
    # the vocabulary and the positions are the same, the widths are not
    tiny_text.save_parent(folder / "a", seed=0)
    tiny_text.save_parent(folder / "b", seed=1, width=12)
    return folder


def written(home: Path, name: str, folders: tuple[str, ...] = ("a", "b"), **changes: Any) -> Path:
    content = tiny_text.recipe(home / "data", [home / f for f in folders], **changes)
    return write_recipe(home / f"{name}.yaml", content)


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    trained = {"name": "c", "train": {"start": str(home / "a"), "epochs": 30, "batch_size": 16,
                                      "lr": 5e-3, "seed": 3}}  # fmt: skip
    parents = [trained, {"name": "d", "train": trained["train"] | {"seed": 4}}]
    path = written(home, "run", parents=parents, finetune={"epochs": 8, "batch_size": 16})
    with pytest.MonkeyPatch.context() as patch:
        parents_unexported(patch)
        unproved(patch)  # the tests below do it
        return compress(path, out=home / "run")


def test_the_child_is_a_stock_model_with_its_tokenizer(run: Run) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        run.model, output_loading_info=True
    )
    assert not any(info.values())
    assert model.config.hidden_size == 8 and type(model).__name__ == "BertForSequenceClassification"
    assert tuple(model.config.id2label.values()) == tiny_text.CLASSES
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    inputs = tokenizer(["the old cat", "moss"], padding=True, return_tensors="pt")
    with torch.no_grad():
        want = model.eval()(**inputs).logits.numpy()
    session = onnxruntime.InferenceSession(run.model / "onnx" / "model.onnx")
    names = {i.name for i in session.get_inputs()}
    got = session.run(["logits"], {k: v.numpy() for k, v in inputs.items() if k in names})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # the run's own parity bounds
    verified = verify(run.model)
    assert verified.model_class == "BertForSequenceClassification"


def test_a_parent_is_finetuned_from_a_pretrained_model_and_teaches(run: Run) -> None:
    """One word decides the class, so parents learn it, and the child from them."""
    found = {row.name: row.metrics["accuracy"].value for row in run.report.rows}
    assert min(found["c"], found["d"]) > 0.8  # chance: 0.33
    assert found["finetuned"] > 0.6
    assert found["onnx"] == pytest.approx(found["finetuned"], abs=0.03)


def test_the_card_and_the_report_speak_of_texts(run: Run) -> None:
    card = (run.model / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "45 test texts" in card
    assert "AutoModelForSequenceClassification" in card and "AutoTokenizer" in card
    assert "image" not in card
    assert (
        "image"
        not in (run.folder / "report.html")
        .read_text()
        .lower()
        .split("<body")[1]
        .split("data:image")[0]
    )


def test_a_card_counts_blocks_where_texts_are_joined(home: Path) -> None:
    path = written(home, "blocks")
    job = prepare(load_recipe(path), path)
    assert isinstance(job.task, TextTask) and job.task.length == tiny_text.POSITIONS
    joined = CausalLanguageModelling().packing(True).truncating(8)
    for task, words in ((joined, "8-token blocks"), (joined.packing(False), "texts")):
        figures = {"a": Measured(9.0, 8.0, 10.0, 5), "b": Measured(9.0, 8.0, 10.0, 5)}
        files = {"model.safetensors": (figures["a"], None)}
        made = replace(job, task=task)
        card = model_card(made, 0, figures, files, "0")
        assert f"({made.count('test')} test {words}, 95 % interval)" in card
    assert made.count("test") == 45


def test_padding_does_not_change_a_score(run: Run, home: Path) -> None:
    """The shortest texts padded to the longest give the logits that they give alone."""
    from slimfuse.data import load_texts
    from slimfuse.families import Bert

    model, tokenizer = Bert().load(run.model), AutoTokenizer.from_pretrained(run.model)
    split = load_texts(str(home / "data"), folder=True).test
    tokens = Tokens(split, tokenizer)
    short = tokens.order[:3]
    alone = [model(**tokens[i[None]].arguments).logits for i in short]
    tokens.length = int(tokens.lengths.max())
    padded = model(**tokens[short].arguments).logits
    assert len(set(tokens.lengths.tolist())) > 5
    torch.testing.assert_close(padded, torch.cat(alone), rtol=1e-4, atol=1e-5)  # float32


def test_a_plan_counts_usual_texts(home: Path) -> None:
    made = plan(written(home, "plan"))
    child, parent = made.models[-1], made.models[0]
    assert child.params < parent.params and 0 < child.flops < parent.flops


def told(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        plan(path)
    return str(caught.value)


def test_other_tokens_are_refused_by_name(home: Path) -> None:
    tiny_text.save_parent(home / "odd", words=("yak",))
    message = told(written(home, "odd", ("a", "odd")))
    assert "vocab" in message and "parents" in message
    swapped = tiny_text.save_parent(home / "swapped")
    file = swapped / "tokenizer.json"
    text = file.read_text()
    i, j = text.index('"cat": '), text.index('"dog": ')
    assert i < j
    one, two = text[i + 7 : text.index(",", i)], text[j + 7 : text.index(",", j)]
    file.write_text(text.replace(f'"cat": {one}', f'"cat": {two}').replace(
        f'"dog": {two}', f'"dog": {one}'))  # fmt: skip
    path = written(home, "swapped", ("a", "swapped"))
    job = prepare(load_recipe(path), path)
    order = job.parents[1].order
    assert order is not None and {i for i, j in order.items() if i != j} == {int(one), int(two)}
    stages = Stages(job, Store(home / "aligned"))
    before, after = (
        load_file(folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
        for folder in (swapped, stages.parent(job.parents[1])[0])
    )
    swap = torch.arange(len(before))
    swap[[int(one), int(two)]] = torch.tensor([int(two), int(one)])
    assert torch.equal(after, before[swap])


def test_a_folder_without_a_tokenizer_says_how_to_save_one(home: Path) -> None:
    bare = tiny_text.save_parent(home / "bare")
    (bare / "tokenizer.json").unlink()
    message = told(written(home, "bare", ("bare",)))
    assert "tokenizer.json" in message and "tokenizer with save_pretrained" in message


def test_texts_can_not_be_longer_than_the_positions(home: Path) -> None:
    data = {"source": "textfolder", "path": str(home / "data"), "max_length": 25}
    assert "1 … 24 tokens" in told(written(home, "long", data=data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"source": "digits"}}, ("data.source", "textfolder")),
        ({"family": "vit"}, ("family", "bert")),
        ({"finetune": {"augment": ["flip"]}}, ("finetune.augment", "pictures")),
        ({"data": {"source": "textfolder", "path": "x", "image_size": 8}}, ("data.image_size",)),
        ({"parents": [{"name": "a", "train": {"epochs": 1}}]}, ("'config' or 'start'",)),
    ],
)
def test_what_does_not_go_with_texts_is_told_with_its_line(
    home: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = written(home, "wrong", **change)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert all(word in str(caught.value) for word in words)
    assert f"{path}:" in str(caught.value)
