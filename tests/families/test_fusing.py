"""Refits of every family that has a layout: exact where one function has two sets of weights."""

from __future__ import annotations

from typing import Any

import torch
from families.cases import Case, every_refit, logits, permuted, those, widened
from torch import nn

from slimfuse.batch import Batch
from slimfuse.families import Shape
from slimfuse.fuse.refit import Parent, Settings, refit

FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-11
several = those(lambda case: case.refits and not case.keeps)  # parents whose heads may be mixed


def fuse(case: Case, parents: list[nn.Module], config: Any) -> Any:
    """Return the refit of the parents from padded texts, or images."""
    target, x = case.family.build(config).double(), case.batch(64)
    named = [Parent(f"p{i}", model) for i, model in enumerate(parents)]
    # each exact on its side: a post-norm gain is no rotation's, a pre-norm stream has one
    # dimension less than channels, so that the last of copied channels would be a toss-up
    post = case.family.layout(config).norm_order == "post"
    settings = Settings(stream="select" if post else "pca", ridge=1e-3)
    refit(named, target, case.family, lambda: x.split(16), settings, n_batches=4)
    return target


def gap(a: nn.Module, b: nn.Module, x: Batch) -> float:
    """Return the largest difference of two models' logits, relative to the largest logit."""
    found, wanted = logits(a, x), logits(b, x)
    return float((found - wanted).abs().max() / wanted.abs().max())


@every_refit
def test_a_copy_with_twice_the_units_in_another_order_fuses_into_the_model(case: Case) -> None:
    model, x = case.parent(), case.batch(9)
    wider = Shape(30, 3, 2 * case.wide.intermediate_size, 2)
    twice = widened(case, model, ("resid", "pool", "mlp", "qk", "vo"), wider)
    mixed = permuted(case, twice, ("resid", "pool", "mlp", "qk", "vo"))
    assert gap(fuse(case, [mixed], case.config()), model, x) < FUSED


@several
def test_a_model_fuses_with_its_permuted_copy_into_itself(case: Case) -> None:
    model, x = case.parent(), case.batch(9)
    other = permuted(case, model, ("resid", "pool", "mlp", "qk", "vo", "head", "embed"))
    assert gap(fuse(case, [model, other], case.config()), model, x) < FUSED


@every_refit
def test_a_narrow_target_is_closer_than_a_random_one(case: Case) -> None:
    model, x = case.parent(), case.batch(9)
    narrow = case.family.narrow(model.config, case.narrow)
    torch.manual_seed(0)
    random = case.family.build(narrow).double()
    assert gap(fuse(case, [model], narrow), model, x) < gap(random, model, x)
