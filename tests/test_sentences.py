"""Sentence encoders keep their own pooling and limits: read, refused, followed, written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from safetensors.torch import load_file
from tiny_run import write_recipe
from transformers import AutoTokenizer

from slimfuse.errors import ParentError
from slimfuse.families import family_of
from slimfuse.fuse.importance import all_depths_importance
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.sentences import Encoder, common_encoder, read_encoder
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store
from slimfuse.tasks import SentenceEmbedding

OLD, NEW = "sentence_transformers.models", "sentence_transformers.base.modules"
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
USUAL = ("Transformer", "Pooling", "Normalize")


def describe(
    folder: Path, pooling: dict[str, Any] | None, *kinds: str, longest: int | None = None,
    package: str = OLD, **files: dict[str, Any],
) -> Path:  # fmt: skip
    """Write beside a model what sentence-transformers would."""
    folder.mkdir(exist_ok=True)
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{package}.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if longest is not None:
        files["sentence_bert_config"] = {"max_seq_length": longest}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        (MEAN, "mean"),
        (CLS, "cls"),
        ({"word_embedding_dimension": 8, **MEAN, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "cls", **MEAN}, "cls"),  # the newer key counts
        ({"embedding_dimension": 8}, "mean"),
    ],
    ids=str,
)
def test_pooling_is_read_of_old_and_new_files(
    tmp_path: Path, pooling: dict[str, Any], wanted: str
) -> None:
    assert read_encoder(describe(tmp_path, pooling, *USUAL)).pooling == wanted
    assert read_encoder(describe(tmp_path, pooling, *USUAL[:2], package=NEW)).pooling == wanted


def test_a_folder_without_modules_is_pooled_by_the_mean(tmp_path: Path) -> None:
    assert read_encoder(tmp_path) == Encoder("mean", None)
    assert common_encoder({}) == Encoder("mean", None)


@pytest.mark.parametrize(
    ("pooling", "kinds", "files", "file", "got", "allowed"),
    [
        ({"pooling_mode": "max"}, USUAL, {}, "1_Pooling/config.json", "max", "mean, cls"),
        ({"pooling_mode_max_tokens": True}, USUAL, {}, "1_Pooling/config.json", "max", "mean, cls"),
        ({**MEAN, "pooling_mode_cls_token": True}, USUAL, {}, "1_Pooling/config.json",
         "cls and mean", "mean, cls"),
        ({"pooling_mode": ["mean", "max"]}, USUAL, {}, "1_Pooling/config.json", "mean and max",
         "mean, cls"),
        ({"pooling_mode_weightedmean_tokens": True}, USUAL, {}, "1_Pooling/config.json",
         "weightedmean", "mean, cls"),
        ({"pooling_mode_lasttoken": True}, USUAL, {}, "1_Pooling/config.json", "lasttoken",
         "mean, cls"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, USUAL, {}, "1_Pooling/config.json",
         "mean_sqrt_len", "mean, cls"),
        (MEAN, (*USUAL[:2], "Dense"), {}, "modules.json", "Transformer, Pooling, Dense",
         ", ".join(USUAL)),
        (MEAN, ("Transformer",), {}, "modules.json", "Transformer", ", ".join(USUAL)),
        (MEAN, USUAL, {"sentence_bert_config": {"do_lower_case": True}},
         "sentence_bert_config.json", "do_lower_case true", "false"),
        (MEAN, USUAL, {"config_sentence_transformers":
                       {"prompts": {"query": "query: "}, "default_prompt_name": "query"}},
         "config_sentence_transformers.json", "default_prompt_name query", "null"),
        (None, USUAL, {}, "1_Pooling/config.json", "No such file", "sentence-transformers saves"),
        (MEAN, USUAL, {"modules": {}}, "modules.json", "dict", "sentence-transformers saves"),
        (MEAN, USUAL, {"sentence_bert_config": {"max_seq_length": "128"}},
         "sentence_bert_config.json", "max_seq_length '128'", "sentence-transformers saves"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_its_file(
    tmp_path: Path, pooling: dict[str, Any] | None, kinds: tuple[str, ...],
    files: dict[str, Any], file: str, got: str, allowed: str,
) -> None:  # fmt: skip
    describe(tmp_path, pooling, *kinds, **files)
    with pytest.raises(ParentError) as caught:
        read_encoder(tmp_path)
    error = caught.value
    assert error.where == str(tmp_path / file) and got in str(error.got)
    assert allowed in str(error.allowed) and error.hint


def test_a_default_prompt_that_is_empty_changes_nothing(tmp_path: Path) -> None:
    told = {"prompts": {"document": ""}, "default_prompt_name": "document"}
    assert read_encoder(describe(tmp_path, CLS, *USUAL, config_sentence_transformers=told))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    tiny_text.save_texts(folder / "data", (60, 40))
    describe(tiny_text.save_parent(folder / "a", seed=0), CLS, *USUAL, longest=20)
    describe(tiny_text.save_parent(folder / "b", seed=1, width=12), CLS, *USUAL, longest=14)
    describe(tiny_text.save_parent(folder / "mean", seed=2), MEAN, *USUAL)
    tiny_text.save_parent(folder / "bare", seed=3)
    return folder


def job_of(home: Path, *names: str, **data: Any) -> Job:
    source = {"source": "textfolder", "path": str(home / "data"), "calibration": {"samples": 40}}
    content = tiny_text.recipe(
        home / "data", [home / n for n in names], task="sentence-embedding", data=source | data
    )
    path = write_recipe(home / f"{'-'.join([*names, *map(str, data)])}.yaml", content)
    return prepare(load_recipe(path), path)


@pytest.mark.parametrize("other", ["mean", "bare"])
def test_parents_that_pool_differently_are_refused(home: Path, other: str) -> None:
    with pytest.raises(ParentError, match="pool their tokens differently") as caught:
        job_of(home, "a", other)
    assert caught.value.where == "parents" and caught.value.got == "a: cls; b: mean"
    assert caught.value.allowed and "modules.json" in str(caught.value.hint)


def test_a_first_tokens_state_is_what_the_run_measures_and_the_child_says(home: Path) -> None:
    job = job_of(home, "a", "b")
    assert isinstance(job.task, SentenceEmbedding) and job.task.pooling == "cls"
    stages = Stages(job, Store(home / "store"))
    model: Any = job.family.load(home / "a")
    inputs = job.samples("test")[torch.arange(40)]
    assert bool((inputs.arguments["attention_mask"] == 0).any())  # some are padded
    with torch.no_grad():
        states = model(**inputs.arguments).last_hidden_state
    found = stages.outputs(job.parents[0]).test["embeddings"]
    # the same float32 sums in batches of another size
    torch.testing.assert_close(found, states[:, 0], rtol=1e-4, atol=1e-5)
    start = stages.start("fused")
    made = load_file(start.path / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in made.values())

    extras = job.task.extras(job.processor, job.target)
    pooling = extras["1_Pooling/config.json"]
    assert pooling == {"word_embedding_dimension": 8, **CLS}
    for name, content in extras.items():
        (start.path / name).parent.mkdir(exist_ok=True)
        (start.path / name).write_text(json.dumps(content))
    assert read_encoder(start.path) == Encoder("cls", 14)


def test_the_cards_lines_give_the_embeddings_of_the_run(home: Path) -> None:
    for names in (("a", "b"), ("mean", "bare")):
        job = job_of(home, *names)
        job.task.save(job.processor, home / "saved")
        model: Any = job.family.load(home / names[0])
        preprocessor = AutoTokenizer.from_pretrained(home / "saved")
        lines: dict[str, Any] = {"model": model, "preprocessor": preprocessor}
        with torch.no_grad():
            exec(job.task.usage, lines)
            states = model(**lines["inputs"]).last_hidden_state
        mask = lines["inputs"]["attention_mask"]
        assert mask[0].tolist() == [1] * 4 + [0] * 2  # on the right
        wanted = states[0, 0] if job.task.usage.count("[:, 0]") else states[0, :4].mean(0)
        torch.testing.assert_close(lines["embeddings"][0], wanted)


def test_padding_is_on_the_right_where_the_first_token_counts(home: Path, tmp_path: Path) -> None:
    folder = tiny_text.save_parent(tmp_path / "left", seed=0)
    describe(folder, CLS, *USUAL)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"padding_side": "left"}))
    tiny_text.save_texts(tmp_path / "data", (60, 40))
    job = job_of(tmp_path, "left")
    job.task.save(job.processor, tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "right"


def test_a_fit_weighs_the_tokens_by_what_the_encoder_reads(home: Path) -> None:
    last = {}
    for names in (("a", "b"), ("mean", "bare")):
        job = job_of(home, *names)
        models = [job.family.load(home / names[0])]
        layouts = [job.family.layout(model.config) for model in models]
        batch = job.samples("test")[torch.arange(40)]
        last[job.family.layout(job.target).readout] = all_depths_importance(
            models, layouts, lambda batch=batch: [batch]
        )[-1]
    assert set(last) == {0, "mean"}
    # behind the last block only what is read has a gradient; the others get the floor of 0.05
    torch.testing.assert_close(last[0][1:], torch.full_like(last[0][1:], 0.05))
    assert float(last[0][0]) > 0.9 * len(last[0]) and float(last["mean"][1]) > 0.1
    # the families that all recipes share are as they were
    assert family_of("bert", "sentence-embedding").layout(job.target).readout == "mean"


def test_the_finished_model_takes_longer_texts_than_the_run(home: Path, tmp_path: Path) -> None:
    job = job_of(home, "a", "b", max_length=7)
    assert job.task.length == 7 and job.processor.model_max_length == tiny_text.POSITIONS
    assert max(job.samples("test").lengths) == 7
    job.task.save(job.processor, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.model_max_length == tiny_text.POSITIONS
    text = " ".join(["cat"] * 50)
    assert len(saved(text, truncation=True)["input_ids"]) == tiny_text.POSITIONS
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "max_length" not in config and config["truncation_side"] == "right"
    extras = job.task.extras(job.processor, job.target)
    # the least of the parents' own, though the tokenizer takes more
    assert extras["sentence_bert_config.json"]["max_seq_length"] == 14
    # the ONNX files are measured through the saved tokenizer, on the same tokens
    again = job.task.samples(job.data.test, job.task.load(tmp_path))
    inputs = job.samples("test")[torch.arange(40)].arguments
    found = again[torch.arange(40)].arguments
    assert all(torch.equal(found[name], value) for name, value in inputs.items())


def test_limits_are_the_parents_where_the_recipe_gives_none(home: Path) -> None:
    job = job_of(home, "a", "b")
    assert job.task.length == 14 and job.processor.model_max_length == 24
    job = job_of(home, "mean", "bare")
    assert job.task.length == 24
    extras = job.task.extras(job.processor, job.target)
    assert extras["sentence_bert_config.json"]["max_seq_length"] == 24
    # what the recipe measures the finished model can be given
    job = job_of(home, "a", "b", max_length=18)
    extras = job.task.extras(job.processor, job.target)
    assert extras["sentence_bert_config.json"]["max_seq_length"] == 18


def test_a_tokenizers_limit_below_the_positions_stays(home: Path, tmp_path: Path) -> None:
    folder = tiny_text.save_parent(tmp_path / "short", seed=0)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 16}))
    tiny_text.save_texts(tmp_path / "data", (60, 40))
    assert job_of(tmp_path, "short", max_length=7).processor.model_max_length == 16
    assert job_of(tmp_path, "short").task.length == 16
    # positions are 24; the recipe says what the tokenizer doesn't
    assert job_of(tmp_path, "short", max_length=20).processor.model_max_length == 20
