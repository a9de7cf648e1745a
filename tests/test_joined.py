"""Texts that are joined into blocks are cut in a row: limits, shards, calibration, plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text
import torch
from tiny_run import write_recipe

from slimfuse.data import Split, load_texts
from slimfuse.pipeline import planning
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.labelling import limited, training_split
from slimfuse.pipeline.planning import Outset, make_plan
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import Data, Limit, Train, load_recipe
from slimfuse.store import Store

TEXTS, TEST, A_TEXT, LENGTH = 60, 24, 3, 6  # a text is [CLS] word [SEP], a block two of them
SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 12}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts of one word each, all of them different, and their tokenizer."""
    folder = tmp_path_factory.mktemp("joined")
    (folder / "data").mkdir()
    words = [f"w{i}" for i in range(TEXTS + TEST)]
    (folder / "data" / "train.txt").write_text("\n".join(words[:TEXTS]))
    (folder / "data" / "test.txt").write_text("\n".join(words[TEXTS:]))
    tiny_text.tokenizer(words).save_pretrained(folder / "tokenizer")
    return folder


def opened(home: Path, train: dict[str, Any] | None = None, **data: Any) -> Job:
    content = tiny_text.recipe(
        home / "data", [], family="gpt2", task="causal-lm",
        parents=[{"name": "a", "train": {"config": SHAPE, "epochs": 1} | (train or {})}],
    )  # fmt: skip
    content["data"] |= {"tokenizer": str(home / "tokenizer"), "max_length": LENGTH} | data
    path = write_recipe(home / "recipe.yaml", content)
    return prepare(load_recipe(path), path)


def numbers(items: Any) -> list[int]:
    return [int(items[i][1:]) for i in range(len(items))]


def words_of(job: Job, ids: torch.Tensor) -> list[int]:
    """Return the numbers of the texts in some tokens."""
    tokens = job.processor.convert_ids_to_tokens(ids.flatten().tolist())
    return [int(token[1:]) for token in tokens if token.startswith("w")]


def test_a_limit_keeps_the_first_texts(home: Path) -> None:
    data = opened(home, limit={"train": 20, "test": 7}).data
    assert numbers(data.train.items) == list(range(20))
    assert numbers(data.test.items) == list(range(TEXTS, TEXTS + 7))
    whole = opened(home, limit={"train": 999}).data
    assert len(whole.train) == TEXTS


def test_texts_one_by_one_are_drawn_as_other_samples_are(home: Path) -> None:
    data = opened(home, limit={"train": 20}, packing=False).data
    texts = load_texts(str(home / "data"), folder=True, kind="none")
    assert numbers(data.train.items) == numbers(texts.train.sample(20, 0).items)
    # a task that joins nothing has packing's default, and draws
    spec = tiny_text.recipe(home / "data", [])["data"] | {"limit": Limit(train=20)}
    drawn = limited(texts, Data.model_validate(spec | {"packing": False}))
    assert numbers(drawn.train.items) == numbers(data.train.items) != list(range(20))


def test_a_classifier_draws_its_samples(tmp_path: Path) -> None:
    folder = tiny_text.save_texts(tmp_path / "data")
    content = tiny_text.recipe(folder, [tiny_text.save_parent(tmp_path / "a")])
    content["data"]["limit"] = {"train": 30}
    path = write_recipe(tmp_path / "r.yaml", content)
    found = prepare(load_recipe(path), path).data.train
    wanted = load_texts(str(folder), folder=True).train.sample(30, 0)
    assert list(found.items) == list(wanted.items)


def test_shards_are_pieces_in_a_row(home: Path) -> None:
    job = opened(home)
    parts = []
    for shard in ("1/3", "2/3", "3/3"):
        train = Train.model_validate({"config": SHAPE, "epochs": 1, "shard": shard, "samples": 50})
        parts.append(numbers(training_split(train, job.data, joined=True).items))
    assert [i for part in parts for i in part] == list(range(50))  # the first, in order
    assert [len(part) for part in parts] == [16, 17, 17]
    every = Train.model_validate({"config": SHAPE, "epochs": 1})
    assert training_split(every, job.data, joined=True) is job.data.train


def test_a_parent_is_trained_on_its_piece(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimfuse.pipeline import stages

    seen: list[Split] = []
    prepared = stages.BaseStages.prepared

    def spy(self: Stages, split: Split, *, uniform: bool = False) -> Any:
        seen.append(split)
        return prepared(self, split, uniform=uniform)

    monkeypatch.setattr(stages.BaseStages, "prepared", spy)
    job = opened(home, {"shard": "2/3"})
    Stages(job, Store(tmp_path)).parent(job.parents[0])
    assert [numbers(split.items) for split in seen] == [list(range(20, 40))]
    # 20 texts are 60 tokens, 10 blocks: one step of up to 128
    assert make_plan(job).models[0].steps == 1


@pytest.mark.parametrize("samples", [7, 999])
def test_calibration_draws_whole_blocks_of_the_joined_texts(
    home: Path, tmp_path: Path, samples: int
) -> None:
    job = opened(home, calibration={"samples": samples, "seed": 3})
    stages = Stages(job, Store(tmp_path))
    found, chunks = stages.calibration()
    drawn = torch.cat(chunks)
    blocks = TEXTS * A_TEXT // LENGTH
    assert len(drawn) == min(samples, blocks)
    assert found is stages.samples("train") and len(found) == blocks
    wanted = np.random.default_rng(3).permutation(blocks)[:samples]
    assert drawn.tolist() == sorted(wanted.tolist())
    for i in drawn:  # every block holds two texts that follow each other
        first, second = words_of(job, found[i[None]].arguments["input_ids"])
        assert second == first + 1 == 2 * int(i) + 1


def test_a_plan_counts_blocks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Outset] = []
    monkeypatch.setattr(planning, "plan_of", given.append)
    make_plan(opened(home, calibration={"samples": 40}))
    make_plan(opened(home, calibration={"samples": 40}, packing=False))
    blocks = TEXTS * A_TEXT // LENGTH
    assert [(o.samples, o.tokens) for o in given] == [(blocks, LENGTH), (40, A_TEXT)]


def test_keys_tell_how_joined_texts_are_cut(home: Path, tmp_path: Path) -> None:
    one, two = (
        Stages(opened(home, packing=packing), Store(tmp_path)).base["task"]
        for packing in (True, False)
    )
    assert one == ["causal-lm", "cut in a row"]
    assert two == ["causal-lm", False]  # as it was, so that stages of other tasks are found again
