"""Tokens that only pad change nothing: not what is read, not what counts, not what is fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.cases import CASES, logits
from torch import Tensor, nn

from slimfuse.batch import Batch, token_mask
from slimfuse.families import Layout, Shape
from slimfuse.fuse import fits, walk
from slimfuse.fuse.importance import gradients, token_weights
from slimfuse.fuse.refit import Parent, Settings, refit
from slimfuse.fuse.repair import repair

BERT = next(case for case in CASES if case.name == "bert")
VOCABULARY, TOKENS = 13, 6
SUMS = {"rtol": 0, "atol": 1e-12}  # float64, the same sums in another order
SMALL = Shape(9, 3, 11, 2)
FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-11


def texts(n: int, pads: int, lengths: Tensor | None = None) -> Batch:
    """Return right-padded texts; pads: the seed of the tokens that pad them."""
    ids = torch.randint(0, VOCABULARY, (n, TOKENS), generator=torch.Generator().manual_seed(1))
    fill = torch.randint(0, VOCABULARY, (n, TOKENS), generator=torch.Generator().manual_seed(pads))
    lengths = 2 + torch.arange(n) % (TOKENS - 1) if lengths is None else lengths
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return Batch({"input_ids": torch.where(mask.bool(), ids, fill), "attention_mask": mask})


def cut(batch: Batch, length: int) -> Batch:
    """Return the first tokens of every text, without padding."""
    return Batch({"input_ids": batch.arguments["input_ids"][:, :length]})


def models(count: int, depth: int = 2) -> list[Any]:
    return [BERT.model(Shape(15, 3, 17, depth), seed=seed) for seed in range(count)]


def fused(parents: list[Any], pads: int, shape: Shape, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    target = BERT.family.build(BERT.config(shape)).double()
    x = texts(80, pads)
    random = options.pop("random_features", False)
    named = [Parent(f"p{i}", model, 1 + i) for i, model in enumerate(parents)]
    done = refit(
        named, target, BERT.family, lambda: x.split(16), Settings(**options), n_batches=5,
        random_features=random,
    )  # fmt: skip
    return target, done


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_pads_differ_and_real_tokens_do_not() -> None:
    one, two = texts(10, 2), texts(10, 3)
    mask = token_mask(one)
    assert mask is not None and torch.equal(mask, two.arguments["attention_mask"].bool())
    left, right = one.arguments["input_ids"], two.arguments["input_ids"]
    assert torch.equal(left[mask], right[mask]) and not torch.equal(left[~mask], right[~mask])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_streams_of_real_tokens_are_those_of_the_text_alone(attention: str) -> None:
    model = BERT.family.build(BERT.config(), attention=attention).double()
    model.load_state_dict(BERT.model().state_dict())
    layout, batch = BERT.family.layout(model.config), texts(10, 2)
    with torch.no_grad():
        padded = list(walk.streams(model, layout, batch))
        for i in range(10):
            length = int(batch.arguments["attention_mask"][i].sum())
            alone = walk.streams(model, layout, cut(batch[i : i + 1], length))
            for whole, own in zip(padded, alone, strict=True):
                torch.testing.assert_close(whole[i : i + 1, :length], own, **SUMS)


def test_the_stock_logits_are_what_the_head_makes_of_the_readout() -> None:
    model, batch = BERT.model(), texts(10, 2)
    layout = BERT.family.layout(model.config)
    with torch.no_grad():
        begun = walk.start(model, layout, batch)
        *_, last = walk.streams_from(model, layout, begun)
        top = walk.apply(model, layout.head, walk.read_out(model, layout, last, begun.mask))
    torch.testing.assert_close(top, logits(model, batch), **SUMS)
    torch.testing.assert_close(top, logits(model, texts(10, 3)), **SUMS)


def test_gradients_reach_real_tokens_alone() -> None:
    model = BERT.model()
    layout = BERT.family.layout(model.config)
    whole = texts(12, 2, torch.full((12,), 4))
    ours = gradients(model, layout, whole.split(5), range(5), directions=True)
    alone = gradients(model, layout, cut(whole, 4).split(5), range(5), directions=True)
    torch.testing.assert_close(ours.tokens[:, :4], alone.tokens, **SUMS)
    assert not ours.tokens[:, 4:].any() and (ours.tokens[0, :4] > 0).all()
    torch.testing.assert_close(ours.directions, alone.directions, **SUMS)


def test_a_place_counts_by_the_texts_that_reach_it() -> None:
    model = BERT.model()
    layout = BERT.family.layout(model.config)
    lengths = torch.tensor([3, 6, 5, 3])
    whole = texts(4, 2, lengths)
    found = gradients(model, layout, [whole], range(5)).tokens
    other = gradients(model, layout, [texts(4, 3, lengths)], range(5)).tokens
    torch.testing.assert_close(found, other, **SUMS)
    # the longest text alone has the last place: its mean is that of one
    begun = walk.start(model, layout, whole)
    stream = begun.stream.detach().requires_grad_()
    with torch.enable_grad():
        *_, last = walk.streams_from(model, layout, walk.Start(stream, begun.calls, begun.mask))
        top = walk.apply(model, layout.head, walk.read_out(model, layout, last, begun.mask))
        signs = torch.randint(0, 2, top.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        (grad,) = torch.autograd.grad(((top - top.mean(1, keepdim=True)) * signs).sum(), stream)
    energy = grad.square().sum(-1)
    torch.testing.assert_close(found[0, 5], energy[1, 5], **SUMS)
    torch.testing.assert_close(found[0, 3], energy[[1, 2], 3].mean(), **SUMS)
    assert (token_weights([gradients(model, layout, [whole], range(5))], [1.0]) > 0).all()


METHODS: dict[str, dict[str, Any]] = {
    "select": {"stream": "select"},
    "pca": {"stream": "pca", "units": "ot", "heads": "merge", "ridge": 0.01},
    "gradient-pca": {"stream": "gradient-pca", "ridge": 0.01},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parents", [1, 2])
def test_what_pads_does_not_matter_to_a_fusion(parents: int, method: str) -> None:
    given = models(parents)
    one, done = fused(given, 2, SMALL, **METHODS[method])
    two, other = fused(given, 3, SMALL, **METHODS[method])
    assert_same_weights(one, two)
    assert done.stream_errors == other.stream_errors


def test_what_pads_does_not_matter_to_random_features() -> None:
    assert_same_weights(
        *(fused(models(1), pads, SMALL, random_features=True, ridge=0.01)[0] for pads in (2, 3))
    )


def test_what_pads_does_not_matter_where_rows_are_drawn_and_blocks_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = fused(models(1, depth=3), 2, SMALL, ridge=0.01)[0]
    monkeypatch.setattr(fits, "WORK", 0)
    one, two = (fused(models(1, depth=3), pads, SMALL, ridge=0.01)[0] for pads in (2, 3))
    assert_same_weights(one, two)
    pairs = zip(whole.parameters(), one.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)  # some rows were left out


def test_what_pads_does_not_matter_to_a_repair() -> None:
    (model,), mended = models(1), []
    for pads in (2, 3):
        broken, x = BERT.model(), texts(80, pads)
        with torch.no_grad():
            broken.bert.encoder.layer[0].output.dense.weight.mul_(0.7)
        repair([Parent("p", model)], broken, BERT.family, lambda x=x: x.split(16))  # type: ignore[misc]
        mended.append(broken)
    assert_same_weights(*mended)
    assert float((logits(mended[0], texts(9, 4)) - logits(model, texts(9, 4))).abs().max()) < 1e-3


def test_self_fusion_at_equal_width_from_padded_texts_is_exact() -> None:
    (model,) = models(1)
    target, done = fused([model], 2, Shape(15, 3, 17, 2), stream="select")
    fresh = texts(25, 5)
    found, wanted = logits(target, fresh), logits(model, fresh)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < FUSED
    assert max(done.stream_errors) < FUSED


def layout_reading(readout: Any) -> Layout:
    return Layout("resid", (), (), "", "head", readout)


def test_what_is_pooled_is_what_a_hand_computes() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    lengths = [2, 4, 1]
    mean = torch.stack([x[i, :n].sum(0) / n for i, n in enumerate(lengths)])
    last = torch.stack([x[i, n - 1] for i, n in enumerate(lengths)])
    rows = torch.stack([x[i, t] for i, n in enumerate(lengths) for t in range(n)])
    torch.testing.assert_close(walk.pooled(layout_reading("mean"), x, mask), mean, **SUMS)
    assert torch.equal(walk.pooled(layout_reading("last"), x, mask), last)
    assert torch.equal(walk.pooled(layout_reading("all"), x, mask), rows)
    assert torch.equal(walk.pooled(layout_reading(2), x, mask), x[:, 2])
    left = torch.tensor([[0, 0, 1, 1]]).bool()  # padded on the left
    assert torch.equal(walk.pooled(layout_reading("last"), x[:1], left), x[:1, 3])
    torch.testing.assert_close(walk.pooled(layout_reading("mean"), x, None), x.mean(1), **SUMS)
    both = torch.cat([x[:2, 0], torch.stack([x[i, 1:n].mean(0) for i, n in enumerate([2, 4])])], 1)
    found = walk.pooled(layout_reading("first+mean"), x[:2], mask[:2])
    torch.testing.assert_close(found, both, **SUMS)
    assert torch.equal(walk.pooled(layout_reading("last"), x, None), x[:, -1])
    assert torch.equal(walk.pooled(layout_reading("all"), x, None), x.flatten(0, 1))
