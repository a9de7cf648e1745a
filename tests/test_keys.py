"""What decides a stage's answer is part of its key; what computes it is in the lock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny_text
from tiny_run import recipe, save_parent, write_recipe

from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.lock import lock_of
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store, digest
from slimfuse.tasks import TASKS, CausalLanguageModelling, SentenceEmbedding
from slimfuse.tasks.embeddings import IMAGES


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    home = tmp_path_factory.mktemp("keys")
    tiny_text.save_texts(home / "data", (60, 40))
    folder = tiny_text.save_parent(home / "a")
    content = tiny_text.recipe(home / "data", [folder], task="sentence-embedding")
    path = write_recipe(home / "r.yaml", content)
    return prepare(load_recipe(path), path)


def key(job: Job, tmp_path: Path) -> str:
    return digest(Stages(job, Store(tmp_path)).base)


def told(change: Callable[[Any], None]) -> Any:
    made = tiny_text.tokenizer(("[MASK]",))
    change(made)
    return made


def cut_left(tokenizer: Any) -> None:
    tokenizer.truncation_side = "left"


def pad_left(tokenizer: Any) -> None:
    tokenizer.padding_side = "left"


def mask(tokenizer: Any) -> None:
    tokenizer.mask_token = "[MASK]"


def other_mask(tokenizer: Any) -> None:
    tokenizer.mask_token = "fox"


def pad(tokenizer: Any) -> None:
    tokenizer.pad_token = "[UNK]"


def end(tokenizer: Any) -> None:
    tokenizer.eos_token = "[SEP]"


def begin(tokenizer: Any) -> None:
    tokenizer.bos_token = "[CLS]"


def longer(tokenizer: Any) -> None:
    tokenizer.model_max_length = 999


def nothing(_tokenizer: Any) -> None: ...


def test_every_setting_of_a_tokenizer_changes_the_keys(job: Job, tmp_path: Path) -> None:
    changes = [nothing, cut_left, pad_left, mask, other_mask, pad, end, begin, longer]
    keys = [key(replace(job, processor=told(change)), tmp_path) for change in changes]
    assert len(set(keys)) == len(changes)
    called = told(nothing)
    called(["the old cat"], truncation=True, max_length=3, padding=True)
    assert key(replace(job, processor=called), tmp_path) == keys[0]  # how it was last called


def test_pooling_packing_and_length_change_the_keys(job: Job, tmp_path: Path) -> None:
    sentences, words = TASKS["sentence-embedding"], TASKS["causal-lm"]
    assert isinstance(sentences, SentenceEmbedding) and isinstance(words, CausalLanguageModelling)
    tasks: list[Any] = [
        sentences, sentences.pooled("cls", None), sentences.pooled("mean", 9),
        sentences.truncating(7), words, words.packing(False), words.truncating(7),
    ]  # fmt: skip
    keys = [key(replace(job, task=task), tmp_path) for task in tasks]
    assert len(set(keys)) == len(tasks)
    assert (sentences.pooling, sentences.length, words.joins) == ("mean", None, True)


def test_the_lock_and_the_keys_hold_what_cuts_texts_and_reads_images(
    job: Job, tmp_path: Path
) -> None:
    save_parent(tmp_path / "a")
    path = write_recipe(
        tmp_path / "r.yaml", recipe(parents=[{"name": "a", "from": str(tmp_path / "a")}])
    )
    for made, library in ((job, "tokenizers"), (prepare(load_recipe(path), path), "timm")):
        assert lock_of(made)["versions"][library] == version(library)
        assert Stages(made, Store(tmp_path)).base["versions"][library] == version(library)


def test_the_token_that_stands_for_an_image_changes_the_keys(tmp_path: Path) -> None:
    save_parent(tmp_path / "a")
    path = write_recipe(
        tmp_path / "r.yaml", recipe(parents=[{"name": "a", "from": str(tmp_path / "a")}])
    )
    made = prepare(load_recipe(path), path)
    tasks = [IMAGES, IMAGES.reading("mean", 1), IMAGES.reading("mean", 2)]
    assert len({key(replace(made, task=task), tmp_path) for task in tasks}) == len(tasks)
