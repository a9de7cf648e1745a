"""A recipe for texts that runs in seconds, with saved parents and their tokenizer."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slimfuse.families import Bert, Shape

CLASSES = ("animal", "plant", "tool")
WORDS = {
    "animal": ("cat", "dog", "emu", "fox", "gnu"),
    "plant": ("oak", "elm", "ivy", "fern", "moss"),
    "tool": ("saw", "axe", "file", "vice", "drill"),
}
FILLING = ("a", "the", "old", "new", "small", "big", "and", "of")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
POSITIONS = 24


def tokenizer(words: Sequence[str] = ()) -> Any:
    """Return a tokenizer of whole words; words: some that it knows beside the usual ones."""
    known = (*SPECIAL, *FILLING, *(w for group in WORDS.values() for w in group), *words)
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=POSITIONS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def save_parent(
    folder: Path, *, seed: int = 0, width: int = 16, words: Sequence[str] = (),
    classes: Sequence[str] = CLASSES,
) -> Path:  # fmt: skip
    """Save a random BERT with its tokenizer."""
    saved = tokenizer(words)
    config = Bert().new_config(
        Shape(width, 2, 24, 2), vocab_size=len(saved), positions=POSITIONS, labels=list(classes)
    )
    torch.manual_seed(seed)
    Bert().build(config).save_pretrained(folder)  # type: ignore[operator]
    saved.save_pretrained(folder)
    return folder


def save_texts(folder: Path, counts: tuple[int, int] = (120, 45)) -> Path:
    """Write train.csv and test.csv: sentences of different lengths, told by one word."""
    folder.mkdir(parents=True)
    drawn = random.Random(0)
    for name, count in zip(("train", "test"), counts, strict=True):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for i in range(count):
                label = CLASSES[i % len(CLASSES)]
                words = drawn.choices(FILLING, k=drawn.randint(0, 12))
                words.insert(drawn.randint(0, len(words)), drawn.choice(WORDS[label]))
                rows.writerow([" ".join(words), label])
    return folder


def recipe(texts: Path, folders: Sequence[Path], **changes: Any) -> dict[str, Any]:
    """Return a recipe on these texts and saved parents."""
    made: dict[str, Any] = {
        "version": 1,
        "name": "tiny-text",
        "family": "bert",
        "task": "text-classification",
        "data": {
            "source": "textfolder", "path": str(texts),
            "calibration": {"samples": 60},
        },
        "parents": [
            {"name": "ab"[i], "from": str(folder)} for i, folder in enumerate(folders)
        ],
        "target": {"hidden_size": 0.5, "intermediate_size": 0.5},
        "finetune": {"epochs": 2, "batch_size": 16},
        "export": {"quantize": {"mode": "dynamic"}},
        "bench": {"threads": [1], "batch": [1], "warmup": 1, "min_seconds": 0.02},
        "runtime": {"threads": 1, "precision": "fp32"},
    }  # fmt: skip
    return made | changes
