"""Refits of decoders: exact where theory allows it, better than a copy of weights elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import duplicate, permute
from tiny_decoders import (
    DECODERS,
    EVERY,
    TOKENS,
    VOCABULARY,
    WIDER,
    build,
    config_of,
    decoder,
    gap,
    ids,
    logits,
    moved,
)
from torch import Tensor, nn

from slimfuse.batch import Batch, Inputs
from slimfuse.errors import ParentError, ShapeError, UserError
from slimfuse.families import Shape
from slimfuse.families.decoder import Decoder
from slimfuse.fuse import layers, tables, walk
from slimfuse.fuse.baselines import subclone
from slimfuse.fuse.choice import Choice
from slimfuse.fuse.fits import Draw
from slimfuse.fuse.importance import gradients
from slimfuse.fuse.labels import LabelUnion
from slimfuse.fuse.refit import Fusion, Parent, Settings, refit
from slimfuse.fuse.tied import symmetric
from slimfuse.fuse.union import Member, Union
from slimfuse.spaces import LinearMap

FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-12
FITTED = ("resid", "head", "mlp")  # spaces that may be wider than the target's

every_family = pytest.mark.parametrize("family", DECODERS.values(), ids=DECODERS)
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


def widened(family: Decoder, model: Any, space: str) -> Any:
    return moved(family, model, (space,), lambda n, _seed: duplicate(n), **WIDER[space])


@every_family
@both
@pytest.mark.parametrize("stream", ["pca", "select"])
def test_self_fusion_at_equal_width_is_the_parent(family: Decoder, stream: str, tied: bool) -> None:
    model = decoder(family, tied=tied)
    assert gap(fuse(family, [model], model.config, stream=stream), model) < FUSED


@pytest.mark.parametrize("stream", ["gradient-pca", "ot", "cluster"])
def test_every_other_stream_map_is_exact_at_equal_width(stream: str) -> None:
    model = decoder(LLAMA, tied=True)
    target, done = run(LLAMA, [model], model.config, stream=stream)
    assert gap(target, model) < FUSED
    assert {p.part for p in done.parts} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tied"),
    [("llama", False), ("qwen3", True), ("gemma3", True)],
    ids=["untied", "tied", "sandwich"],
)
@pytest.mark.parametrize("space", FITTED)
def test_fusing_undoes_a_widened_copy(name: str, space: str, tied: bool) -> None:
    family = DECODERS[name]
    model = decoder(family, tied=tied)
    stream = "pca" if tied else "select"
    wide = widened(family, model, space)
    assert gap(fuse(family, [wide], model.config, stream=stream), model) < FUSED


@every_family
def test_fusing_undoes_a_copy_permuted_in_every_space(family: Decoder) -> None:
    model = decoder(family, tied=family is LLAMA)
    copy = moved(family, model, EVERY, permute)
    assert gap(fuse(family, [copy, model], model.config), model) < FUSED


@both
def test_parents_of_different_width_and_number_of_key_heads_that_are_one_function(
    tied: bool,
) -> None:
    model = decoder(LLAMA, tied=tied)
    wide = widened(LLAMA, widened(LLAMA, model, "head"), "resid")
    assert wide.config.num_key_value_heads == 6 and model.config.num_key_value_heads == 3
    assert gap(fuse(LLAMA, [wide, model], model.config), model) < FUSED


def test_a_tied_and_an_untied_parent_of_one_function_fuse_into_either() -> None:
    tied = decoder(LLAMA, tied=True)
    untied = build(LLAMA, config_of(LLAMA))
    untied.load_state_dict(tied.state_dict())
    for parents in ([tied, untied], [untied, tied]):
        for config in (tied.config, untied.config):
            target = fuse(LLAMA, parents, config)
            assert gap(target, tied) < FUSED
            one = target.lm_head.weight is target.model.embed_tokens.weight
            assert one is config.tie_word_embeddings


def test_a_tied_head_of_flat_gain_is_only_scaled() -> None:
    model = decoder(LLAMA, tied=True, spread=0.0)
    gain = fuse(LLAMA, [model], model.config).model.norm.weight
    torch.testing.assert_close(gain, torch.ones_like(gain), rtol=0, atol=1e-6)  # float64 solves


def test_a_tied_head_s_gain_is_what_the_turned_stream_makes_of_the_parent_s() -> None:
    model = decoder(LLAMA, tied=True)
    target, done = run(LLAMA, [model], model.config, stream="pca")
    gains, wanted = target.model.norm.weight.sort().values, model.model.norm.weight.sort().values
    torch.testing.assert_close(gains, wanted, rtol=0, atol=1e-6)
    # the map that is told is the turned one
    table = model.model.embed_tokens.weight @ done.stream.encode.T
    torch.testing.assert_close(target.model.embed_tokens.weight, table, rtol=0, atol=1e-10)


@pytest.mark.parametrize("after", [0, 1])
def test_a_block_that_adds_nothing_is_fused_away(after: int) -> None:
    family = DECODERS["qwen3"]
    deep = decoder(family, shape=Shape(36, 6, 17, 3))
    with torch.no_grad():
        for name, p in deep.named_parameters():
            if f"layers.{after}." in name and ("o_proj" in name or "down_proj" in name):
                p.zero_()
    given = ((0, 1), (2,)) if after == 0 else ((0,), (1, 2))
    target = fuse(family, [deep], config_of(family), layers=given)
    assert gap(target, deep) < FUSED


def padded(n: int, fill: int) -> list[Inputs]:
    """Batches whose sequences are of different length, padded on the right with a token."""
    x = ids(n, seed=7)
    lengths = torch.arange(n) % (TOKENS - 2) + 3
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    whole = Batch({"input_ids": torch.where(mask.bool(), x, fill), "attention_mask": mask})
    return list(whole.split(16))


@both
def test_padding_is_never_seen(tied: bool) -> None:
    family = DECODERS["qwen2" if tied else "qwen3"]
    model = decoder(family, tied=tied)
    config = family.narrow(model.config, Shape(20, 4, 11, 1))
    one, other = (fuse(family, [model], config, batches=padded(32, fill)) for fill in (0, 5))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert gap(fuse(family, [model], model.config, batches=padded(48, 0)), model) < FUSED


def centred_error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Return |a - b|² / |b|² of logits without their mean over the vocabulary."""
    found, wanted = (z - z.mean(-1, keepdim=True) for z in (logits(a, x), logits(b, x)))
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_half_the_width_beats_a_copy_of_weights_and_random_features(name: str) -> None:
    """Of random weights, which have no structure to keep."""
    family = DECODERS[name]
    model, x = decoder(family), ids(50, seed=3)
    config = family.narrow(model.config, Shape(18, 2, 9, 2))
    given = list(ids(96, seed=7).split(16))
    torch.manual_seed(0)  # of the random features
    copy = build(family, config)
    subclone(model, copy, family)
    fused = centred_error(fuse(family, [model], config, batches=given), model, x)
    chance = fuse(family, [model], config, batches=given, random_features=True)
    # 0.43 … 0.63 (a sandwich's branches are all as loud), 0.89 … 0.92 and 1.18 … 1.20 measured
    assert fused < 0.8 * centred_error(chance, model, x) < 0.8 * centred_error(copy, model, x)


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


def test_heads_of_several_gains_share_one_and_keep_their_direction() -> None:
    family = DECODERS["qwen3"]
    parents = [decoder(family, seed=s, spread=0.5) for s in (0, 3)]
    with torch.no_grad():
        parents[1].model.layers[0].self_attn.q_norm.weight.mul_(torch.tensor([1.0, -1, 1, -1]))
    target = build(family, config_of(family))
    whole = tuple(range(i, i + 1) for i in range(2))
    union = Union([Parent(f"p{i}", m) for i, m in enumerate(parents)], family, [whole] * 2)
    members, block = union.members(0), family.layout(target.config).blocks[0]
    picks = [torch.eye(3).double()[:, :2], torch.eye(3).double()[:, 2:]]
    maps: Any = [{block.head_space: LinearMap(p, p)} for p in picks]
    stub: Any = SimpleNamespace(union=union, target=target)
    with torch.no_grad():
        factors = layers._head_gains(stub, block, "q", members, Choice(maps, picks[0], ()))
    assert factors is not None and [len(f) for f in factors] == [24, 24]  # 3 · 2 heads of 4
    gain = target.get_parameter(f"{block.q_norm}.weight").detach()
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for member, factor in zip(members, factors, strict=True):
        own = union.states[member.parent][f"{block.q_norm}.weight"]
        cosine = nn.functional.cosine_similarity(gain * (factor[:4] * x), own * x, dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)
    both = [union.states[m.parent][f"{block.q_norm}.weight"] for m in members]
    rms = ((2 * both[0].square() + both[1].square()) / 3).sqrt()
    torch.testing.assert_close(gain.abs(), rms, rtol=1e-12, atol=0)
    assert Member(0, 0) in members


def test_merging_heads_under_rotary_positions_is_refused() -> None:
    model = decoder(LLAMA)
    with pytest.raises(UserError, match="can't be merged") as caught:
        fuse(LLAMA, [model], model.config, heads="merge")
    assert caught.value.where == "fuse.heads"


@pytest.mark.parametrize("keys", [{"key_heads": 6}, {"head_dim": 6}])
def test_heads_of_another_size_are_refused(keys: dict[str, int]) -> None:
    model, other = decoder(LLAMA), decoder(LLAMA, **keys)
    with pytest.raises(ShapeError, match="keep their size") as caught:
        fuse(LLAMA, [model, other], model.config)
    assert caught.value.where == "parents.p1"


def test_goals_of_classes_are_refused() -> None:
    model = decoder(LLAMA)
    everything = torch.arange(VOCABULARY)
    told = torch.randn(200, VOCABULARY, dtype=torch.float64)
    union = LabelUnion.fit([told, told], [everything, everything])
    with pytest.raises(ParentError, match="over a vocabulary"):
        fuse(LLAMA, [model, model], model.config, goals=union)


@both
def test_random_features_keep_all_that_reads(tied: bool) -> None:
    model = decoder(LLAMA, tied=tied)
    torch.manual_seed(0)
    before = {k: v.clone() for k, v in build(LLAMA, model.config).state_dict().items()}
    torch.manual_seed(0)
    after = fuse(LLAMA, [model], model.config, random_features=True).state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    written = {n for n in before if "o_proj" in n or "down_proj" in n}
    assert changed == written | ({"model.norm.weight"} if tied else {"lm_head.weight"})


def test_one_sample_gives_a_finite_model() -> None:
    for tied in (False, True):
        model = decoder(LLAMA, tied=tied)
        config = LLAMA.narrow(model.config, Shape(20, 4, 11, 1))
        target = fuse(LLAMA, [model], config, batches=[ids(1)])
        assert all(bool(p.isfinite().all()) for p in target.parameters())


def test_heads_stay_in_blocks_of_their_kind() -> None:
    family = DECODERS["gemma3"]
    model = decoder(family)
    target, done = run(family, [model], family.narrow(model.config, Shape(36, 6, 17, 1)),
                       layers=((0, 1),))  # fmt: skip
    assert target.config.layer_types == ["full_attention"]
    sources = next(part.sources for part in done.parts if part.part == "q_proj")
    assert {block for _, block, _ in sources} == {1}


def test_a_sandwich_s_branches_have_the_wanted_size() -> None:
    """At half width, where the parents' norm isn't the target's."""
    family = DECODERS["gemma3"]
    model = decoder(family, spread=0.4)
    config = family.narrow(model.config, Shape(20, 4, 11, 2))
    given = list(ids(96, seed=7).split(16))
    target, done = run(family, [model], config, batches=given)
    layout, x = family.layout(config), torch.cat(given)
    assert all(bool((p != 0).all()) for n, p in target.named_parameters() if "post_" in n)
    with torch.no_grad():
        streams = [
            *zip(
                walk.streams(target, layout, x),
                walk.streams(model, family.layout(model.config), x),
                strict=True,
            )
        ]
    encode = done.stream.encode
    for own, wide in streams[1:]:
        wanted = wide.flatten(0, 1) @ encode.T
        slope = (own.flatten(0, 1) * wanted).sum() / own.square().sum()
        assert float(slope) == pytest.approx(1, abs=0.1)  # least squares shrink, if anything


def test_a_sandwich_of_one_token_everywhere_is_finite() -> None:
    family = DECODERS["gemma3"]
    model = decoder(family)
    config = family.narrow(model.config, Shape(20, 4, 11, 2))
    target = fuse(family, [model], config, batches=[torch.full((2, 7), 5)])
    assert all(bool(p.isfinite().all()) for p in target.parameters())


def test_the_symmetric_fit_is_the_dense_one() -> None:
    """Against least squares over the entries on and above the diagonal."""
    generator = torch.Generator().manual_seed(0)
    table, read, goal = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((11, 4), (30, 4), (30, 11))
    )
    units = [(i, j) for i in range(4) for j in range(i, 4)]
    columns = []
    for i, j in units:
        step = torch.zeros(4, 4).double()
        step[i, j] = step[j, i] = 1.0
        columns.append((read @ step @ table.T).flatten())
    best = torch.linalg.lstsq(torch.stack(columns, 1), goal.flatten()[:, None]).solution[:, 0]
    a, c, aim = table.T @ table, read.T @ read, table.T @ goal.T @ read
    found = symmetric(a, c, aim, torch.zeros(4, 4).double(), 0.0)
    for (i, j), value in zip(units, best, strict=True):
        assert float(found[i, j]) == pytest.approx(float(value), rel=1e-6, abs=1e-8)
    assert torch.equal(found, found.T)
