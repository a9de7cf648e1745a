"""Tiny decoders and their refits, as several tests take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_decoders import (
    DECODERS,
    TOKENS,
    build,
    ids,
)

from slimfuse.batch import Batch, Inputs
from slimfuse.families.decoder import Decoder
from slimfuse.fuse.refit import Fusion, Parent, Settings, refit

FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-12
both = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
LLAMA = DECODERS["llama"]


def run(
    family: Decoder, parents: list[Any], config: Any, batches: Any = None, **options: Any
) -> tuple[Any, Fusion]:
    target, x = build(family, config), ids(24, seed=7)
    given: list[Inputs] = list(x.split(12)) if batches is None else batches
    random, goals = options.pop("random_features", False), options.pop("goals", None)
    done = refit(
        [Parent(f"p{i}", m) for i, m in enumerate(parents)], target, family, lambda: given,
        Settings(**options), n_batches=len(given), random_features=random, goals=goals,
    )  # fmt: skip
    return target, done


def fuse(family: Decoder, parents: list[Any], config: Any, **options: Any) -> Any:
    return run(family, parents, config, **options)[0]


def padded(n: int, fill: int) -> list[Inputs]:
    """Batches whose sequences are of different length, padded on the right with a token."""
    x = ids(n, seed=7)
    lengths = torch.arange(n) % (TOKENS - 2) + 3
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    whole = Batch({"input_ids": torch.where(mask.bool(), x, fill), "attention_mask": mask})
    return list(whole.split(16))
