"""The head of a refitted decoder: least squares, means, goals, and which tokens count."""

from __future__ import annotations

import pytest
import torch
from fuse.decoders import FUSED, LLAMA, both, fuse, padded, run
from tiny import permute
from tiny_decoders import (
    VOCABULARY,
    build,
    decoder,
    gap,
    ids,
    logits,
    moved,
)
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.errors import ParentError
from slimfuse.families import Shape
from slimfuse.fuse import tables, walk
from slimfuse.fuse.fits import Draw
from slimfuse.fuse.importance import gradients
from slimfuse.fuse.labels import LabelUnion
from slimfuse.fuse.refit import Parent, Settings, refit


@both
def test_the_head_is_the_least_squares_one(tied: bool) -> None:
    """Against a dense fit with all logits in memory, in float64."""
    model = decoder(LLAMA, tied=tied)
    config = LLAMA.narrow(model.config, Shape(20, 4, 11, 2))
    given = list(ids(192, seed=7).split(16))
    target, done = run(LLAMA, [model], config, batches=given, ridge=1e-9)
    x = torch.cat(given)
    layout = LLAMA.layout(config)
    with torch.no_grad():
        *_, last = walk.streams(target, layout, x)
        norm = target.model.norm.weight
        read = walk.read_out(target, layout, last) / norm
    wanted = logits(model, x).flatten(0, 1)
    told = logits(target, x).flatten(0, 1)
    if not tied:
        best = torch.linalg.lstsq(read, wanted).solution
        torch.testing.assert_close(told, read @ best, rtol=0, atol=1e-6)  # the ridge's share
        return
    error = (told - wanted - (told - wanted).mean(1, keepdim=True)).square().sum()
    whole = (wanted - wanted.mean(1, keepdim=True)).square().sum()
    assert done.parts[-1].error == pytest.approx(float(error / whole), rel=1e-6)
    table = target.model.embed_tokens.weight.detach()
    for i in range(0, 20, 7):  # no turn of the stream and no gain is better: the gradient is 0
        for j in range(i, 20, 6):
            step = torch.zeros(20, 20).double()
            step[i, j] = step[j, i] = 1.0
            move = read @ step @ table.T
            move = move - move.mean(1, keepdim=True)
            slope = (move * (told - wanted)).sum() / (move.norm() * (told - wanted).norm())
            assert abs(float(slope)) < 1e-6


def test_a_head_with_a_bias_gets_the_parents_mean_bias() -> None:
    model = decoder(LLAMA)
    other = moved(LLAMA, model, ("resid",), permute)
    target = build(LLAMA, model.config)
    noise = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(2)).double()
    for own, bias in zip((model, other, target), (noise[0], noise[1], 0 * noise[0]), strict=True):
        own.lm_head.bias = nn.Parameter(bias)  # as other classes have one
    given = list(ids(32, seed=7).split(16))
    named = [Parent("p", model, 3.0), Parent("q", other, 1.0)]
    refit(named, target, LLAMA, lambda: given, Settings(), n_batches=2)
    wanted = logits(model) - noise[0] + 0.75 * noise[0] + 0.25 * noise[1]
    torch.testing.assert_close(logits(target), wanted, rtol=0, atol=FUSED)


def test_a_vocabulary_goes_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(LLAMA, tied=True)
    config = LLAMA.narrow(model.config, Shape(20, 4, 11, 2))
    whole = fuse(LLAMA, [model], config)
    monkeypatch.setattr(tables, "ROWS", 10)
    sliced = fuse(LLAMA, [model], config)
    assert gap(sliced, whole) < 1e-9  # float64 sums in another order


def test_all_of_the_head_fit_s_gram_is_centred_over_rows() -> None:
    tables_ = [torch.randn(23, d, dtype=torch.float64) for d in (5, 3)]
    beside = torch.cat([t - t.mean(0) for t in tables_], dim=1)
    found = tables.centred_gram(tables_)
    torch.testing.assert_close(found, beside.T @ beside, rtol=0, atol=1e-12)  # float64 sums


def test_gradients_of_every_token_s_logits_have_the_jacobian_s_energy() -> None:
    model = decoder(LLAMA)
    layout, x = LLAMA.layout(model.config), ids(1)
    found = gradients(model, layout, [x] * 300, [4]).tokens[0]
    with torch.no_grad():
        *_, last = walk.streams(model, layout, x)

    def head(stream: Tensor) -> Tensor:
        out = walk.apply(model, layout.head, walk.read_out(model, layout, stream))
        return out - out.mean(1, keepdim=True)

    wanted = torch.autograd.functional.jacobian(head, last).square().sum((0, 1, 2, 4))
    wanted = wanted * last[0].square().sum(-1)  # of errors in proportion to the stream
    # 300 normal draws in 36 dimensions: a spread of about √(2/300/10) = 3 %
    torch.testing.assert_close(found, wanted, rtol=0.15, atol=0)


def test_pads_of_a_head_that_reads_every_token_have_no_gradient() -> None:
    model = decoder(LLAMA)
    layout = LLAMA.layout(model.config)
    batches = padded(32, 0)
    tokens = gradients(model, layout, batches, range(5)).tokens
    assert (tokens > 0).all()
    short = [Batch({k: v[:1] for k, v in b.arguments.items()}) for b in batches[:1]]
    alone = gradients(model, layout, short, range(5)).tokens
    assert (alone[:, :3] > 0).all() and not alone[:, 3:].any()


def test_a_token_counts_in_proportion_to_its_own_stream() -> None:
    model = decoder(LLAMA)
    layout, x = LLAMA.layout(model.config), ids(12)
    tokens = gradients(model, layout, [x], range(5)).tokens
    with torch.no_grad():  # all of a stream may be larger: RMSNorm's readers don't see it
        for name, p in model.named_parameters():
            if "embed" in name or "o_proj" in name or "down_proj" in name:
                p *= 7.0
    torch.testing.assert_close(
        gradients(model, layout, [x], range(5)).tokens, tokens, rtol=1e-4, atol=0
    )  # but for the norms' epsilon


def test_a_massive_token_rules_no_fit_of_the_stream() -> None:
    energy = torch.ones(3, 5, dtype=torch.float64)
    energy[1, 2] = 1e6
    draw = Draw(torch.ones(1, 5, dtype=torch.float64), rows=15)
    draw.see(3, None)
    draw.tell(0, energy)
    weights = draw.weights(0, 0)
    assert float((weights * energy.flatten()).max()) == pytest.approx(15 / 14, rel=1e-5)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-12)
    assert torch.equal(draw.weights(0, 0, "reading"), torch.ones(15).double())


def test_an_even_draw_counts_all_real_tokens_the_same() -> None:
    importance = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)).double() + 0.05
    draw = Draw(importance, rows=4000)
    mask = torch.arange(50) < 30 + torch.arange(40)[:, None] % 20
    draw.see(40, mask)
    places, weights = draw(0, 0, 9, "even")
    assert torch.equal(places, mask.flatten().nonzero()[:, 0]) and (weights == 1).all()


def test_goals_of_classes_are_refused() -> None:
    model = decoder(LLAMA)
    everything = torch.arange(VOCABULARY)
    told = torch.randn(200, VOCABULARY, dtype=torch.float64)
    union = LabelUnion.fit([told, told], [everything, everything])
    with pytest.raises(ParentError, match="over a vocabulary"):
        fuse(LLAMA, [model, model], model.config, goals=union)
