"""Text models that a run trains from nothing, tokenizer and all."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from tiny_run import parents_unexported, undrawn, unproved, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimfuse import compress, verify
from slimfuse.batch import call
from slimfuse.errors import UserError
from slimfuse.families import FAMILIES_OF
from slimfuse.pipeline import plan
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.lock import lock_of
from slimfuse.pipeline.new_tokenizer import train_tokenizer
from slimfuse.recipe import Recipe, load_recipe
from slimfuse.recipe.matching import DECODERS, ENCODERS, GROUPED
from slimfuse.tasks.texts import backend

DECODER = "gpt2" if "gpt2" in FAMILIES_OF["causal-lm"] else "llama"
WHO = ("the cat", "a dog", "the old man", "my aunt", "the baker", "a fox")
DOES = ("sees", "likes", "finds", "sells", "draws", "paints")
WHAT = ("a red house", "the sea", "some bread", "two small birds", "a green door", "nothing")
WHEN = ("today", "at night", "in spring", "every day")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 48}  # fmt: skip


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(words) for words in (WHO, DOES, WHAT, WHEN)).capitalize() + "."
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prose")
    (folder / "data").mkdir()
    for seed, (name, count) in enumerate((("train", 400), ("test", 60))):
        (folder / "data" / f"{name}.txt").write_text("\n".join(sentences(count, seed)))
    tiny_text.save_texts(folder / "labelled")
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    unproved(monkeypatch)  # the tests below do it
    undrawn(monkeypatch)
    parents_unexported(monkeypatch)


def recipe(home: Path, family: str, task: str, **data: Any) -> dict[str, Any]:
    labelled = task == "text-classification"
    train = {"config": SHAPE, "epochs": 4, "batch_size": 16, "lr": 5e-3}
    return {
        "version": 1, "name": "fresh", "family": family, "task": task,
        "data": {
            "source": "textfolder", "path": str(home / ("labelled" if labelled else "data")),
            "max_length": 24, "calibration": {"samples": 48}, "vocabulary": 400, **data,
        },
        "parents": [{"name": "a", "train": train}],
        "target": {"hidden_size": 0.5, "intermediate_size": 0.5},
        "finetune": {"epochs": 1, "batch_size": 16, "lr": 2e-3},
        "baselines": [],
        "export": {"quantize": {"mode": "none"}},
        "bench": {"threads": [1], "batch": [1], "warmup": 1, "min_seconds": 0.02},
        "runtime": {"threads": 1, "precision": "fp32"},
    }  # fmt: skip


def opened(path: Path, *overrides: str) -> Job:
    loaded = load_recipe(path, overrides)
    assert isinstance(loaded, Recipe)
    return prepare(loaded, path)


def told(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        plan(path, overrides=overrides)
    return str(caught.value)


# ---- tokenizers


@pytest.mark.parametrize("family", [*ENCODERS, "gpt2"])
def test_a_trained_tokenizer_is_of_the_familys_kind(family: str, tmp_path: Path) -> None:
    texts = sentences(200, 0)
    made = train_tokenizer(texts, 300, family, 24)
    made.save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert backend(found) == backend(made) and found.model_max_length == 24
    assert len(made) <= 300 and sorted(made.get_vocab().values()) == list(range(len(made)))
    ids = found(texts[0])["input_ids"]
    wanted = texts[0] if family in ("gpt2", "roberta") else texts[0].lower()
    assert found.decode(ids, skip_special_tokens=True).replace(" .", ".") == wanted
    if family == "gpt2":
        assert found.eos_token_id == found.bos_token_id == 0 and found.pad_token_id is None
        assert found.decode(found("Ünïcode ☃")["input_ids"]) == "Ünïcode ☃"  # bytes: all known
        return
    assert ids[0] == found.cls_token_id and ids[-1] == found.sep_token_id
    assert found.mask_token_id is not None and found.unk_token_id is not None
    # RoBERTa and MPNet count positions from the padding token, whose number is 1 there
    assert found.pad_token_id == (1 if family in ("roberta", "mpnet") else 0)
    pair = found("a cat", "a dog")
    assert ("token_type_ids" in pair) == (family in ("bert", "electra"))


def test_many_letters_leave_half_of_the_vocabulary() -> None:
    letters = [chr(0x4E00 + i) + chr(0x5E00 + i) for i in range(2000)]
    assert len(train_tokenizer(letters, 400, "bert", 24)) <= 400


def test_another_process_trains_the_same_tokenizers() -> None:
    """The library's own word pieces are others every time."""
    code = (
        "import sys, hashlib\n"
        "from slimfuse.pipeline.new_tokenizer import train_tokenizer\n"
        "from slimfuse.tasks.texts import backend\n"
        "texts = sys.stdin.read().splitlines()\n"
        "made = [backend(train_tokenizer(texts, 350, f, 24)) for f in ('bert', 'gpt2')]\n"
        "print(*(hashlib.sha256(told.encode()).hexdigest() for told in made))"
    )
    texts = sentences(200, 0)
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(texts), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    here = [backend(train_tokenizer(texts, 350, family, 24)) for family in ("bert", "gpt2")]
    assert done.stdout.split() == [hashlib.sha256(told.encode()).hexdigest() for told in here]


# ---- configs


@pytest.mark.parametrize(
    ("family", "task"),
    [*((f, "text-classification") for f in ENCODERS), *((f, "masked-lm") for f in ENCODERS),
     *((f, "causal-lm") for f in DECODERS if f in FAMILIES_OF["causal-lm"])],
)  # fmt: skip
def test_every_family_begins_from_nothing(home: Path, family: str, task: str) -> None:
    content = recipe(home, family, task)
    if family in GROUPED:
        content["parents"][0]["train"] |= {"config": SHAPE | {"num_key_value_heads": 1}}
    path = write_recipe(home / f"{family}-{task}.yaml", content)
    job = opened(path)
    config = job.parents[0].config
    assert config.vocab_size == len(job.processor) <= 400
    assert config.max_position_embeddings - getattr(
        job.family, "first_position", lambda _: 0
    )(config) == job.processor.model_max_length == 24  # fmt: skip
    assert config.pad_token_id == job.processor.pad_token_id
    assert config.eos_token_id == job.processor.eos_token_id
    if family in GROUPED:
        assert config.num_key_value_heads == 1
    if task == "text-classification":
        assert tuple(config.id2label.values()) == tiny_text.CLASSES
    with torch.no_grad():
        answer = getattr(call(job.family.build(config), job.example), job.task.output)
    assert answer.isfinite().all()


# ---- whole runs


def test_a_decoder_from_nothing_generates_in_stock_classes(home: Path) -> None:
    content = recipe(home, DECODER, "causal-lm")
    content["parents"] = [
        {"name": name, "train": content["parents"][0]["train"] | {"shard": f"{i + 1}/2", "seed": i}}
        for i, name in enumerate("ab")
    ]
    run = compress(write_recipe(home / "causal.yaml", content), out=home / "causal")
    found = {row.name: row.metrics["perplexity"].value for row in run.report.rows}
    # a uniform guess has the vocabulary's size, 225 tokens at most here
    assert max(found["a"], found["b"]) < 60 and found["finetuned"] < 60
    assert found["onnx"] == pytest.approx(found["finetuned"], rel=1e-3)
    proof = verify(run.model)
    assert proof.model_class in ("GPT2LMHeadModel", "LlamaForCausalLM")
    model, info = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert model.config.vocab_size == len(tokenizer)
    given = tokenizer("The cat", return_tensors="pt")
    said = model.generate(
        **given, min_new_tokens=5, max_new_tokens=5, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    assert said.shape[1] == given["input_ids"].shape[1] + 5
    assert tokenizer.decode(said[0]).startswith("The cat")


def test_an_encoder_from_nothing_fills_masks_in_stock_classes(home: Path) -> None:
    content = recipe(home, "bert", "masked-lm")
    content["parents"][0]["train"] |= {"config": SHAPE | {"num_hidden_layers": 1}}
    path = write_recipe(home / "masked.yaml", content)
    run = compress(path, out=home / "masked")
    found = {row.name: row.metrics["perplexity"].value for row in run.report.rows}
    assert found["a"] < 120  # a uniform guess: some 200
    assert verify(run.model).model_class == "BertForMaskedLM"
    again = opened(path)
    assert backend(AutoTokenizer.from_pretrained(run.model)) == backend(again.processor)


# ---- tokenizers that are given


def test_a_saved_tokenizer_serves_new_models(home: Path) -> None:
    tokenizer = tiny_text.tokenizer()
    tokenizer.save_pretrained(home / "words")
    content = recipe(home, "bert", "text-classification", vocabulary=None, tokenizer="words")
    path = write_recipe(home / "given.yaml", content)
    job = opened(path)
    assert backend(job.processor) == backend(tokenizer)
    assert job.parents[0].config.vocab_size == len(tokenizer)
    job = opened(path, f"data.tokenizer={home / 'words'}")
    assert lock_of(job)["recipe"]["data"]["tokenizer"] == "…/words"
    assert "data.tokenizer" in told(path, "data.tokenizer=./gone")
    (home / "bare").mkdir()
    assert "lacks tokenizer.json" in told(path, "data.tokenizer=bare")
    says = told(path, "task=masked-lm", "data.path=data")
    assert "no token for what is masked" in says and "data.tokenizer" in says


def test_a_saved_tokenizer_has_to_agree_with_the_parents(home: Path) -> None:
    saved = tiny_text.save_parent(home / "saved")
    fresh = {"name": "b", "train": {"config": SHAPE, "epochs": 1}}
    content = recipe(home, "bert", "text-classification", vocabulary=None, max_length=None)
    content["parents"] = [{"name": "a", "from": str(saved)}, fresh]
    path = write_recipe(home / "mixed.yaml", content)
    job = opened(path)
    one, two = (p.config for p in job.parents)
    assert one.vocab_size == two.vocab_size
    assert one.max_position_embeddings == two.max_position_embeddings == tiny_text.POSITIONS
    tiny_text.tokenizer(("yak",)).save_pretrained(home / "other")
    says = told(path, "data.tokenizer=other")
    assert "the recipe's tokenizer has" in says and "'yak'" in says
    tiny_text.tokenizer().save_pretrained(home / "same")
    opened(path, "data.tokenizer=same")
    assert "saved models bring a tokenizer" in told(path, "data.vocabulary=500")


# ---- what is refused


CONFIG = "parents.0.train.config"


@pytest.mark.parametrize(
    ("family", "task", "overrides", "words"),
    [
        ("bert", "masked-lm", ["data.vocabulary=null"], ("data:", "'tokenizer' or 'vocabulary'")),
        ("bert", "masked-lm", ["data.tokenizer=x"], ("data.vocabulary", "stands beside")),
        ("bert", "masked-lm", ["data.vocabulary=100"], ("data.vocabulary", "300")),
        ("bert", "masked-lm", [f"{CONFIG}.patch_size=2"], ("patch_size", "not of texts")),
        ("bert", "masked-lm", [f"{CONFIG}.num_key_value_heads=1"], ("a key head for every head",)),
        ("llama", "causal-lm", [f"{CONFIG}.num_key_value_heads=3"], ("does not divide",)),
        ("llama", "causal-lm", [f"{CONFIG}.hidden_size=34"], ("heads of 17 units", "of 4")),
        ("bert", "sentence-embedding", [], ("parents[0].train", "nothing that a parent could")),
        ("bert", "feature-extraction", [], ("parents[0].train", "from, a saved model")),
        ("vit", "image-classification", ["data.source=digits", "data.path=null",
         "data.max_length=null", "data.vocabulary=null"], ("images need 'patch_size'",)),
        ("vit", "image-classification", ["data.source=digits"], ("data.vocabulary",)),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    home: Path, family: str, task: str, overrides: list[str], words: tuple[str, ...]
) -> None:
    path = write_recipe(home / "wrong.yaml", recipe(home, family, task))
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert all(word in str(caught.value) for word in words), caught.value
