"""Finished folders of every task, each made once: an export takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sharing import once
from tiny_deployed import save_bert, save_gpt2, save_vit
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

SAVED: dict[str, Callable[[Path], Path]] = {
    "image-classification": lambda f: save_vit(f, AutoModelForImageClassification),
    "text-classification": lambda f: save_bert(f, AutoModelForSequenceClassification, num_labels=5),
    "sentence-embedding": lambda f: save_bert(f, AutoModel, "last_hidden_state"),
    "causal-lm": save_gpt2,
    "masked-lm": lambda f: save_bert(f, AutoModelForMaskedLM),
}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished folder of a task; tests only look at it."""
    return lambda task: once(tmp_path_factory, f"deployed-{task}", SAVED[task])
