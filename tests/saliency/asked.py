"""Tiny models of every family with batches and losses, to be scored."""

from __future__ import annotations

from typing import Any

import torch
from families.cases import EVERY
from families.test_gpt2 import CASE as GPT2
from tiny import images, random_vit
from tiny_decoders import DECODERS, TOKENS, VOCABULARY, decoder
from torch import Tensor

from slimfuse.batch import Batch, Inputs
from slimfuse.families import ViT
from slimfuse.saliency import Subject
from slimfuse.saliency.losses import Features, own_answers


def asked_vit(n: int = 12, seed: int = 0, loss: Any = None, **sizes: Any) -> Subject:
    """Return a random ViT that is asked n images in uneven batches."""
    model, family = random_vit(seed, **sizes), ViT()
    atlas, layout = family.atlas(model.config), family.layout(model.config)
    batches = images(n, seed=seed + 1).split(5)
    return Subject(model, atlas, layout, lambda: batches, loss or own_answers(seed))


def first_token(output: Any, _inputs: Inputs) -> Tensor:
    return output.last_hidden_state[:, 0]


def every_subject() -> dict[str, Subject]:
    """Return a random model of each family and ending, by its name."""
    found = {}
    for case in (*EVERY, GPT2):
        model = case.parent()
        headless = case.name.endswith("body")
        loss = Features(first_token) if headless else own_answers()
        batch = case.batch(4)
        found[case.name] = Subject(
            model, case.family.atlas(model.config), case.family.layout(model.config),
            lambda batch=batch: [batch[:3], batch[3:]], loss,
        )  # fmt: skip
    for name, family in DECODERS.items():
        model = decoder(family)
        ids = torch.randint(VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(0))
        batch = Batch({"input_ids": ids})
        found[name] = Subject(
            model, family.atlas(model.config), family.layout(model.config),
            lambda batch=batch: [batch], own_answers(),
        )  # fmt: skip
    return found
