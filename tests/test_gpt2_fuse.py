"""Refits of GPT-2: a head over a vocabulary behind a LayerNorm, tied and untied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.cases import permuted
from families.test_gpt2 import CASE, FAMILY, doubled
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.families import Shape
from slimfuse.fuse import tied as tying
from slimfuse.fuse.refit import Fusion, Parent, Settings, refit

FUSED = 1e-8  # measured values are below 1e-12
SPACES = ("resid", "mlp", "qk", "vo")
both = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def model(seed: int = 0, **inputs: Any) -> Any:
    """Return a model whose table has a row mean along the channels and a real spectrum."""
    found = CASE.model(seed=seed, vocab_size=53, **inputs)
    with torch.no_grad():
        sizes = torch.linspace(2, 0.3, found.config.n_embd).double()
        found.transformer.wte.weight.mul_(3 * sizes)
    return found


def batch(n: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 53, (n, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, 4:] = 0
    return Batch({"input_ids": ids, "attention_mask": mask})


def run(parents: list[Any], config: Any, **options: Any) -> tuple[Any, Fusion]:
    target, x = FAMILY.build(config).double(), batch(96, seed=7)
    random = options.pop("random_features", False)
    named = [Parent(f"p{i}", m) for i, m in enumerate(parents)]
    done = refit(named, target, FAMILY, lambda: x.split(24), Settings(**options), n_batches=4,
                 random_features=random)  # fmt: skip
    return target, done


def told(model: nn.Module, x: Batch | None = None) -> Tensor:
    """Return the log-probabilities (n, tokens, vocabulary)."""
    x = batch(9) if x is None else x
    with torch.no_grad():
        found: Tensor = model(**x.arguments).logits.log_softmax(-1)
    return found


def gap(a: nn.Module, b: nn.Module) -> float:
    found, wanted = told(a), told(b)
    return float((found - wanted).abs().max() / wanted.abs().max())


@both
@pytest.mark.parametrize("stream", ["pca", "select"])
def test_self_fusion_at_equal_width_is_the_parent(stream: str, tied: bool) -> None:
    parent = model(tied=tied)
    assert gap(run([parent], parent.config, stream=stream)[0], parent) < FUSED


@both
def test_a_copy_with_twice_the_units_in_another_order_fuses_into_the_model(tied: bool) -> None:
    # a narrower stream of the same norm has more variance in a channel beside the epsilon
    parent = model(tied=tied, layer_norm_epsilon=1e-12)
    wide = doubled(parent, SPACES, Shape(30, 3, 34, 2))
    mixed = permuted(CASE, wide, SPACES)
    assert gap(mixed, parent) < 1e-12
    assert gap(run([mixed], parent.config, ridge=1e-3)[0], parent) < FUSED


@both
def test_a_model_fuses_with_its_permuted_copy_into_itself(tied: bool) -> None:
    parent = model(tied=tied)
    other = permuted(CASE, parent, (*SPACES, "head"))
    assert gap(run([parent, other], parent.config, ridge=1e-3)[0], parent) < FUSED


def test_a_tied_and_an_untied_parent_of_one_function_fuse_into_either() -> None:
    one = model(tied=True)
    other = FAMILY.build(CASE.config(vocab_size=53, tied=False)).double()
    other.load_state_dict(one.state_dict())
    for parents in ([one, other], [other, one]):
        for config in (one.config, other.config):
            assert gap(run(parents, config)[0], one) < FUSED


def kl(a: nn.Module, b: nn.Module) -> float:
    """Return the mean KL divergence of a from b over new tokens."""
    x = batch(60, seed=3)
    found, wanted = told(a, x), told(b, x)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@both
def test_half_the_width_beats_random_features(tied: bool) -> None:
    parent = model(tied=tied)
    config = FAMILY.narrow(parent.config, Shape(9, 3, 9, 2))
    fused, _ = run([parent], config)
    chance, _ = run([parent], config, random_features=True)
    assert kl(fused, parent) < 0.7 * kl(chance, parent)


def test_a_tied_head_is_nearly_as_good_as_an_untied_one() -> None:
    parent = model(tied=True)
    config = FAMILY.narrow(parent.config, Shape(12, 3, 13, 2))
    found = {}
    for tied in (False, True):
        config.tie_word_embeddings = tied
        found[tied] = kl(run([parent], config)[0], parent)
    assert found[True] < 1.5 * found[False]


def fitted(target: Any, done: Fusion, wanted: Tensor, x: Batch) -> tuple[float, float]:
    """Return the share of the centred logits' variance that the target misses, and what it says."""
    real = x.arguments["attention_mask"].bool()
    with torch.no_grad():
        own = target(**x.arguments).logits[real]
    own, wanted = (z - z.mean(1, keepdim=True) for z in (own, wanted[real]))
    whole = (wanted - wanted.mean(0)).square().sum()
    return float((own - wanted).square().sum() / whole), done.parts[-1].error


@both
def test_the_error_that_is_told_is_the_one_on_the_calibration_texts(tied: bool) -> None:
    parent = model(tied=tied)
    config = FAMILY.narrow(parent.config, Shape(9, 3, 9, 2))
    target, done = run([parent], config, ridge=1e-9)
    x = batch(96, seed=7)
    with torch.no_grad():
        wanted = parent(**x.arguments).logits
    found, said = fitted(target, done, wanted, x)
    assert said == pytest.approx(found, rel=1e-6)


def test_an_untied_heads_bias_is_the_shift_of_ones() -> None:
    parent = model(tied=False)
    target, _ = run([parent], FAMILY.narrow(parent.config, Shape(9, 3, 9, 2)))
    norm = target.transformer.ln_f
    assert bool((norm.bias == 1).all())
    bias = target.lm_head.weight.detach().sum(1)
    assert float(bias.var()) > 0.01  # of logits of order 1


def test_random_features_keep_the_embeddings() -> None:
    parent = model(tied=True)
    torch.manual_seed(0)
    before = FAMILY.build(parent.config).double().state_dict()
    torch.manual_seed(0)
    after = run([parent], parent.config, random_features=True)[0].state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    written = {n for n in before if "c_proj" in n}
    assert changed == written | {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_a_turn_that_keeps_the_ones_keeps_the_function() -> None:
    parent = model(tied=False)
    target, _ = run([parent], FAMILY.narrow(parent.config, Shape(9, 3, 9, 2)))
    before = told(target)
    noise = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()
    ones = torch.ones(9, 1).double()
    inner = torch.linalg.qr(torch.cat([ones, noise[:, 1:]], 1))[0][:, 1:]
    other = torch.linalg.qr(torch.cat([ones, noise.T[:, 1:]], 1))[0][:, 1:]
    rotation = inner @ other.T + 1 / 9
    torch.testing.assert_close(rotation @ ones, ones)
    builder: Any = SimpleNamespace(
        atlas=FAMILY.atlas(target.config), layout=FAMILY.layout(target.config), target=target,
        _norms=lambda: ["transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.h.1.ln_1",
                        "transformer.h.1.ln_2", "transformer.ln_f"],
        _parts=lambda _name: [slice(None)],
    )  # fmt: skip
    with torch.no_grad():
        tying.turn(builder, rotation)
    torch.testing.assert_close(told(target), before, rtol=0, atol=1e-10)
