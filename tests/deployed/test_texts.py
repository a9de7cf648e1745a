"""Without transformers texts get the tokens, answers and continuations that they get with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from slimfuse_export import ExportError
from slimfuse_export.deployed import Deployed, Options, open_deployed
from tiny_text import POSITIONS
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from slimfuse.batch import Batch
from slimfuse.tasks import TASKS

TEXTS = ["the old cat", "a", "moss and fern and unheard words of the small saw", "axe " * 40, ""]


def answers(model: Deployed, texts: list[str], options: Options | None = None) -> list[Any]:
    found = list(model.predict(texts, options))
    assert not any(isinstance(answer, ExportError) for answer in found)
    return found


@torch.no_grad()
def test_labels_and_scores(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("text-classification")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    kept = AutoTokenizer.from_pretrained(folder)
    found = answers(open_deployed(folder), TEXTS)
    for text, answer in zip(TEXTS, found, strict=True):
        inputs = kept([text], truncation=True, return_tensors="pt")
        wanted = model(**inputs).logits.softmax(1)[0]
        assert answer["label"] == model.config.id2label[int(wanted.argmax())]
        scores = {row["label"]: row["score"] for row in answer["scores"]}
        # float32, six figures kept
        np.testing.assert_allclose(
            [scores[model.config.id2label[i]] for i in range(5)], wanted, atol=2e-5
        )


def test_tokens(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("text-classification"), tmp_path / "bert")
    kept = AutoTokenizer.from_pretrained(folder)
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
def test_sentences(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("sentence-embedding"), tmp_path / "bert")
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
    # float32, seven digits kept
    np.testing.assert_allclose([answer["embedding"] for answer in found], wanted, atol=1e-5)


@torch.no_grad()
def test_masks(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("masked-lm")
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


def test_greedy_continuations(folder_of: Callable[[str], Path]) -> None:
    gpt2 = folder_of("causal-lm")
    kept = AutoTokenizer.from_pretrained(gpt2)
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    texts = ["the old cat", "a", "moss and fern"]
    found = answers(open_deployed(gpt2), texts, Options(max_new_tokens=12))
    for text, answer in zip(texts, found, strict=True):
        inputs = kept([text], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        wanted = kept.decode(made[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["text"] == wanted
