"""Figures of embeddings: what no turn or stretch changes, and neighbours counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from slimfuse.batch import MASK, Batch
from slimfuse.data import ImageData, Split, TextData
from slimfuse.tasks import FeatureExtraction, SentenceEmbedding
from slimfuse.tasks.embeddings import ImageFeatures, TextFeatures, mean_pooled, overlap


def cloud(seed: int, width: int = 6, count: int = 60) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_a_mean_is_over_real_tokens() -> None:
    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = mean_pooled(states, Batch({"input_ids": mask, MASK: mask}))
    torch.testing.assert_close(found[0], states[0, :2].mean(0))
    torch.testing.assert_close(found[1], states[1].mean(0))
    torch.testing.assert_close(mean_pooled(states, Batch({"x": mask}))[0], states[0].mean(0))


def test_a_mean_leaves_out_what_stands_before_and_a_token_is_itself() -> None:
    states = torch.randn(2, 5, 3)
    inputs = Batch({"x": states})
    task = ImageFeatures()
    assert torch.equal(task.embed(states, inputs), states[:, 0])
    behind = task.reading("mean", 2)
    torch.testing.assert_close(behind.embed(states, inputs), states[:, 2:].mean(1))
    assert (task.readout, task.prefix) == (0, 0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = mean_pooled(states, Batch({"input_ids": mask, MASK: mask}), 1)
    torch.testing.assert_close(found[0], states[0, 1:3].mean(0))


def test_a_turned_and_stretched_embedding_is_the_same() -> None:
    turn = torch.linalg.qr(cloud(1, 6, 6)).Q
    task = SentenceEmbedding()
    found = task.figures({"embeddings": 3 * cloud(0) @ turn}, cloud(0))
    assert found["spearman"].value == pytest.approx(1, abs=1e-3)  # ties of float32 may swap
    assert found["neighbour_overlap"].value == pytest.approx(1, abs=1e-3)
    assert found["spearman"].n == 30  # pairs share no sample
    alone = task.figures({"embeddings": cloud(0)})
    assert alone["spearman"].value == alone["neighbour_overlap"].value == 1


def test_an_unrelated_embedding_is_chance() -> None:
    found = SentenceEmbedding().figures({"embeddings": cloud(0, 5, 600)}, cloud(1, 6, 600))
    assert found["spearman"].low < 0 < found["spearman"].high
    assert found["neighbour_overlap"].value == pytest.approx(10 / 599, abs=0.01)


def test_neighbours_are_counted_without_oneself() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 2.0, 2.2])
    one = torch.stack([angles.cos(), angles.sin()], 1).double()
    moved = angles.clone()
    moved[1] = 1.9
    two = torch.stack([moved.cos(), moved.sin()], 1).double()
    # nearest before: 1 0 1 4 3; after: 2 3 0 1 3
    assert overlap(one, two, 1).tolist() == [0, 0, 0, 0, 1]
    assert overlap(one, two, 9).tolist() == [1] * 5  # never more than there are others


def test_parents_of_several_widths_are_one_reference() -> None:
    task = TextFeatures()
    gist = task.gist([{"embeddings": cloud(0)}, {"embeddings": cloud(1, 4)}], [1.0, 1.0])
    assert gist.shape == (60, 10)
    torch.testing.assert_close(gist.norm(dim=1), torch.ones(60))


def test_features_are_of_what_the_data_are() -> None:
    split = Split([], np.zeros(0, dtype=np.int64))
    texts = TextData("x", split, split, (), "0", kind="none")
    pictures = ImageData("x", split, split, (), "0", 8, (0, 0, 0), (1, 1, 1), kind="none")
    assert type(FeatureExtraction().of(texts)) is TextFeatures
    assert type(FeatureExtraction().of(pictures)) is ImageFeatures
    states = torch.randn(2, 5, 3)
    found = ImageFeatures().reduce(states, Batch({"pixel_values": states}), torch.zeros(2))
    assert torch.equal(found["embeddings"], states[:, 0])
