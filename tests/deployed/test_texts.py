"""Without transformers texts get the tokens, answers and continuations that they get with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slimfuse_export import ExportError
from slimfuse_export.deployed import Deployed, Options, open_deployed
from tiny_text import POSITIONS, tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from slimfuse.batch import Batch
from slimfuse.onnx import export_onnx
from slimfuse.tasks import TASKS

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": POSITIONS}  # fmt: skip
TEXTS = ["the old cat", "a", "moss and fern and unheard words of the small saw", "axe " * 40, ""]


def save(folder: Path, auto: Any, config: Any, kept: Any, output: str = "logits") -> Path:
    """Save a random model with its tokenizer and its graph."""
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)  # answers far from each other
    model.save_pretrained(folder)
    kept.save_pretrained(folder)
    (folder / "onnx").mkdir()
    example = Batch(dict(kept(["the old cat", "a b c"], return_tensors="pt", padding=True)))
    export_onnx(model, example, folder / "onnx" / "model.onnx", opset=20, output=output)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a BERT with a given class on top."""

    def make(auto: Any, output: str = "logits", **more: Any) -> Path:
        kept = tokenizer(["[MASK]"])
        kept.add_special_tokens({"mask_token": "[MASK]"})
        config = AutoConfig.for_model("bert", vocab_size=len(kept), **SIZES, **more)
        return save(tmp_path_factory.mktemp("bert") / "model", auto, config, kept, output)

    return make


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 without a padding token."""
    plain = tokenizer()
    plain.backend_tokenizer.post_processor = None
    kept = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, unk_token="[UNK]",
                                   eos_token="[SEP]", model_max_length=POSITIONS)  # fmt: skip
    kept.model_input_names = ["input_ids", "attention_mask"]
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(kept), n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS,
        eos_token_id=3, bos_token_id=3,
    )  # fmt: skip
    kept.pad_token = "[PAD]"
    folder = save(tmp_path_factory.mktemp("gpt2") / "model", AutoModelForCausalLM, config, kept)
    kept.pad_token = None
    kept.save_pretrained(folder)
    return folder


def answers(model: Deployed, texts: list[str], options: Options | None = None) -> list[Any]:
    found = list(model.predict(texts, options))
    assert not any(isinstance(answer, ExportError) for answer in found)
    return found


@torch.no_grad()
def test_labels_and_scores(bert: Callable[..., Path]) -> None:
    folder = bert(AutoModelForSequenceClassification, num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    kept = AutoTokenizer.from_pretrained(folder)
    found = answers(open_deployed(folder), TEXTS)
    for text, answer in zip(TEXTS, found, strict=True):
        inputs = kept([text], truncation=True, return_tensors="pt")
        wanted = model(**inputs).logits.softmax(1)[0]
        assert answer["label"] == model.config.id2label[int(wanted.argmax())]
        scores = {row["label"]: row["score"] for row in answer["scores"]}
        # float32, two blocks, six figures kept
        np.testing.assert_allclose(
            [scores[model.config.id2label[i]] for i in range(5)], wanted, atol=2e-5
        )


def test_tokens(bert: Callable[..., Path]) -> None:
    folder = bert(AutoModelForSequenceClassification, num_labels=5)
    kept, model = AutoTokenizer.from_pretrained(folder), open_deployed(folder)
    for side in ("right", "left"):
        kept.truncation_side = side
        TASKS["text-classification"].save(kept, folder)
        model = open_deployed(folder)
        for text in TEXTS:
            wanted = kept(text, truncation=True)["input_ids"]
            row: Any = model.prepare(text).value
            assert list(row.ids) == wanted
            assert row.truncated == (len(kept(text)["input_ids"]) > POSITIONS)


@torch.no_grad()
def test_sentences(bert: Callable[..., Path]) -> None:
    folder = bert(AutoModel, "last_hidden_state")
    kept = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    task: Any = TASKS["sentence-embedding"]
    for name, content in task.pooled("mean", 9).extras(kept, config).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    model = AutoModel.from_pretrained(folder)
    found = answers(open_deployed(folder), TEXTS)
    inputs = kept(TEXTS, truncation=True, max_length=9, padding=True, return_tensors="pt")
    pooled = task.embed(model(**inputs).last_hidden_state, Batch(dict(inputs)))
    wanted = torch.nn.functional.normalize(pooled, dim=1)
    # float32, two blocks, seven digits kept
    np.testing.assert_allclose([answer["embedding"] for answer in found], wanted, atol=1e-5)


@torch.no_grad()
def test_masks(bert: Callable[..., Path]) -> None:
    folder = bert(AutoModelForMaskedLM)
    kept = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    texts = ["the [MASK] cat", "[MASK] [MASK] and the small moss"]
    for text, answer in zip(texts, answers(open_deployed(folder), texts), strict=True):
        inputs = kept([text], return_tensors="pt")
        logits = model(**inputs).logits[0]
        places = (inputs["input_ids"][0] == kept.mask_token_id).nonzero()[:, 0]
        assert len(answer["masks"]) == len(places)
        for place, mask in zip(places, answer["masks"], strict=True):
            scores = logits[place].softmax(0).topk(5)
            assert [row["token"] for row in mask] == kept.convert_ids_to_tokens(scores.indices)
            np.testing.assert_allclose([row["score"] for row in mask], scores.values, atol=2e-5)


def test_greedy_continuations(gpt2: Path) -> None:
    kept = AutoTokenizer.from_pretrained(gpt2)
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    texts = ["the old cat", "a", "moss and fern"]
    found = answers(open_deployed(gpt2), texts, Options(max_new_tokens=12))
    for text, answer in zip(texts, found, strict=True):
        inputs = kept([text], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        wanted = kept.decode(made[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["text"] == wanted
