"""Refits of models without a head: what they give is the parents', up to a rotation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import HEADLESS, Case, logits, permuted, widened
from torch import Tensor, nn

from slimfuse.batch import Batch, call
from slimfuse.errors import ParentError
from slimfuse.families import Shape, family_of
from slimfuse.fuse import walk
from slimfuse.fuse.baselines import select, subclone
from slimfuse.fuse.gauge import average
from slimfuse.fuse.importance import gradients
from slimfuse.fuse.output import _gain, _image, _like_channels
from slimfuse.fuse.refit import Fusion, Parent, Settings, refit
from slimfuse.fuse.repair import repair
from slimfuse.fuse.solve import roots
from slimfuse.fuse.transport import TransportSettings, fuse_by_transport

CASE = {case.name: case for case in HEADLESS}
EXACT = {"rtol": 0, "atol": 1e-8}  # float64; the last norm's least squares are ridged by 1e-9
SPACES = ("resid", "mlp", "qk", "vo", "head")
pre_norm = pytest.mark.parametrize("name", ["vit-body", "deit-body", "dinov2-body"])
some = pytest.mark.parametrize("name", ["vit-body", "bert-body"])


def fused(
    case: Case, parents: list[nn.Module], config: Any, **options: Any
) -> tuple[nn.Module, Fusion]:
    """Return a target fused from padded texts, or images, and what was done."""
    target, x = case.family.build(config).double(), case.batch(64)
    named = [Parent(f"p{i}", model) for i, model in enumerate(parents)]
    settings = Settings(ridge=1e-3, stream=options.pop("stream", "pca"))
    done = refit(
        named, target, case.family, lambda: x.split(16), settings, n_batches=4, **options
    )  # fmt: skip
    return target, done


def hidden(model: nn.Module, x: Batch) -> Tensor:
    """Return the last hidden states as rows."""
    with torch.no_grad():
        found: Tensor = call(model, x).last_hidden_state.flatten(0, 1)
    return found


@pre_norm
@pytest.mark.parametrize("stream", ["pca", "select"])
def test_a_turned_stream_gives_the_same_inner_products_at_its_own_width(
    name: str, stream: str
) -> None:
    # lengths too, not only the cosines that the contract compares: O and U are isometries
    case = CASE[name]
    model, x = case.parent(), case.batch(9)
    target, done = fused(case, [model], model.config, stream=stream)
    ours, theirs = hidden(target, x), hidden(model, x)
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-7, atol=1e-7)
    norm = next(p for p in done.parts if p.part == "layernorm")
    assert norm.error < 1e-7
    assert ours.std(0).min() > 0.01  # and it is no constant


@pre_norm
def test_the_fusions_map_says_how_the_targets_stream_was_turned(name: str) -> None:
    case = CASE[name]
    model, x = case.parent(), case.batch(9)
    target, done = fused(case, [model], model.config)
    last = []
    for one in (model, target):
        layout = case.family.layout(one.config)
        with torch.no_grad():
            last.append(walk.rows([*walk.streams(one, layout, x)][-1]))
    theirs = last[0] - last[0].mean(1, keepdim=True)  # the norms don't see it
    torch.testing.assert_close(last[1], theirs @ done.stream.encode.T, **EXACT)


@some
def test_parents_of_other_widths_and_bases_agree_on_what_they_give(name: str) -> None:
    case = CASE[name]
    model, x = case.parent(), case.batch(9)
    wide = widened(case, model, ("resid", "mlp", "qk", "vo"), Shape(30, 3, 34, 2))
    other = permuted(case, wide, SPACES)
    stream = "pca" if case.images else "select"  # each exact on its side, see test_fusing
    target, _ = fused(case, [model, other], model.config, stream=stream)
    torch.testing.assert_close(logits(target, x), logits(model, x), **EXACT)


@some
def test_a_narrow_body_is_closer_than_copies_prunings_and_random_features(name: str) -> None:
    case = CASE[name]
    model, x = case.parent(), case.batch(9)
    narrow = case.family.narrow(model.config, case.narrow)
    made = {}
    for key in ("subclone", "select"):
        made[key] = case.family.build(narrow).double()
    subclone(model, made["subclone"], case.family)
    select(model, made["select"], case.family, lambda: case.batch(64).split(16))
    torch.manual_seed(0)
    made["random"], _ = fused(case, [model], narrow, random_features=True)
    ours, _ = fused(case, [model], narrow)
    wanted = logits(model, x)
    best = min(float((logits(one, x) - wanted).norm()) for one in made.values())
    assert float((logits(ours, x) - wanted).norm()) < best


def test_a_rotated_post_norm_body_keeps_the_parents_mean() -> None:
    case = CASE["bert-body"]
    model = case.parent()
    target, done = fused(case, [model], case.family.narrow(model.config, case.narrow))
    x, layout = case.batch(64), case.family.layout(model.config)
    means = []
    for one in (model, target):
        with torch.no_grad():
            begun = walk.start(one, layout, x)
            *_, last = walk.streams_from(one, layout, begun)
        means.append(walk.rows(last)[x.arguments["attention_mask"].flatten() > 0].mean(0))
    encode = done.stream.encode
    assert (encode @ means[0]).norm() < 0.9 * means[0].norm()  # the map alone would lose it
    # equal up to what weighs tokens: importance in the fit, all alike here
    assert abs(float(means[1].norm() / means[0].norm()) - 1) < 0.05


@some
def test_the_pooler_that_nothing_reads_keeps_its_units_at_its_own_width(name: str) -> None:
    case = CASE[name]
    model, x = case.parent(), case.batch(9)
    # at its own width every unit stays, in its place, whatever the stream's basis
    target, _ = fused(case, [model], model.config, stream="pca" if case.images else "select")
    with torch.no_grad():
        ours, theirs = (call(one, x).pooler_output for one in (target, model))
    # pre-activations are fitted with a ridge of 1e-3 about what nearly is their own layer
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
    assert theirs.std(0).max() > 0.05  # a constant would not do


@some
def test_importance_without_a_head_is_of_the_pooled_direction(name: str) -> None:
    case = CASE[name]
    model, x = case.parent(), case.batch(5)
    layout = case.family.layout(model.config)
    last = 2 * len(layout.blocks)
    found = gradients(model, layout, [x], [0, last], directions=True)
    assert found.directions is not None and bool((found.tokens[0] > 0).all())
    if case.images:  # after the last block only the class token is read
        assert not bool(found.tokens[1][1:].any()) and found.tokens[1][0] > 0
    # the length of the pooled features doesn't matter: scaled outputs, scaled back gradients
    norm = layout.final_norm or layout.norm_at(last)
    with torch.no_grad():
        for part in ("weight", "bias"):
            model.get_parameter(f"{norm}.{part}").mul_(3)
    again = gradients(model, layout, [x], [0, last])
    torch.testing.assert_close(again.tokens[0], found.tokens[0], rtol=1e-9, atol=0)


@some
def test_a_repaired_body_stays_as_it_is(name: str) -> None:
    case = CASE[name]
    model, x = case.parent(), case.batch(9)
    target = case.family.build(model.config).double()
    target.load_state_dict(model.state_dict())
    repair([Parent("a", model)], target, case.family, lambda: case.batch(64).split(16))
    torch.testing.assert_close(hidden(target, x), hidden(model, x), rtol=0, atol=1e-10)


def test_a_body_can_be_averaged_unit_by_unit_but_not_turned() -> None:
    case = CASE["vit-body"]
    model, x = case.parent(), case.batch(9)
    other = permuted(case, model, SPACES)
    target = case.family.build(model.config).double()
    pair = [Parent("a", model), Parent("b", other)]

    def batches() -> list[Batch]:
        return case.batch(64).split(16)

    average(pair, target, case.family, batches, alignment="permutation")
    torch.testing.assert_close(hidden(target, x), hidden(model, x), rtol=0, atol=1e-10)
    fuse_by_transport(
        [pair[1]], model, target, case.family, batches, TransportSettings(), n_batches=4
    )
    torch.testing.assert_close(hidden(target, x), hidden(model, x), rtol=0, atol=1e-10)
    with pytest.raises(ParentError, match="without a head can't be turned"):
        average(pair, target, case.family, batches)


def test_the_gains_are_the_least_squares_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 7
    square = torch.rand(size, generator=generator).double() + 0.5
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    a = torch.randn(size, 2 * size, generator=generator).double()
    root = roots(a @ a.T / size)[0]
    gain, error = _gain(turn, turn.T @ (square[:, None] * turn), root)
    torch.testing.assert_close(gain, square.sqrt(), rtol=1e-6, atol=0)  # ridged by 1e-9
    assert error < 1e-12
    wanted = root + turn.T @ (square[:, None] * turn)  # out of reach for any gains

    def missed(gain: Tensor) -> float:
        inner = turn.T @ (gain.square()[:, None] * turn)
        return float((root @ (inner - wanted) @ root).square().sum())

    gain, error = _gain(turn, wanted, root)
    assert error == pytest.approx(missed(gain), rel=1e-9)
    for unit in torch.eye(size).double():
        assert missed(gain + 1e-3 * unit) > error and missed(gain - 1e-3 * unit) > error


def test_a_basis_off_the_ones_stays_near_the_channels() -> None:
    basis = _like_channels(9)
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-14)
    assert float(basis.sum(0).abs().max()) < 1e-14
    assert float(basis[:-1].diagonal().min()) > 0.8


def test_the_image_of_a_map_takes_up_the_part_of_the_mean_that_it_cannot_say() -> None:
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(11, 5, generator=generator).double()
    read[:, 4] = 0
    mean = torch.randn(11, generator=generator).double()
    found = _image(read, mean)
    torch.testing.assert_close(found.T @ found, torch.eye(5).double(), rtol=0, atol=1e-12)
    symmetric = roots(read.T @ read)[0]
    torch.testing.assert_close(found @ symmetric, read, rtol=0, atol=1e-7)  # a root of a square
    torch.testing.assert_close((found.T @ mean).norm(), mean.norm() * share(read, mean))


def share(read: Tensor, mean: Tensor) -> Tensor:
    """Return |Uᵀ mean| / |mean|: everything inside the span, and all that is outside."""
    inside = torch.linalg.qr(read[:, :4])[0]
    lost = mean - inside @ (inside.T @ mean)
    return ((inside.T @ mean).square().sum() + lost.square().sum()).sqrt() / mean.norm()


def spearman(model: nn.Module, other: nn.Module, x: Batch) -> float:
    """Return the rank correlation of two models' cosines of mean-pooled texts."""
    from scipy.stats import spearmanr

    pairs = torch.triu_indices(len(x), len(x), 1)
    cosines = []
    for one in (model, other):
        with torch.no_grad():
            rows = torch.cat([call(one, part).last_hidden_state for part in x.split(50)])
        mask = x.arguments["attention_mask"][:, :, None]
        unit = nn.functional.normalize((rows * mask).sum(1) / mask.sum(1), dim=1)
        cosines.append((unit @ unit.T)[pairs[0], pairs[1]].double().numpy())
    return float(spearmanr(*cosines).statistic)


@pytest.mark.slow
def test_half_a_minilm_sees_similar_texts_as_the_whole_one_does() -> None:
    from transformers import AutoTokenizer

    from slimfuse.data.wordnet import load_wordnet

    folder = Path(__file__).parents[2] / "runs" / "zoo" / "minilm"
    if not folder.is_dir():
        pytest.skip("MiniLM isn't here: python benchmarks/weights.py minilm")
    data, family = load_wordnet(), family_of("bert", "sentence-embedding")
    tokenizer, parent = AutoTokenizer.from_pretrained(folder), family.load(folder)

    def texts(split: Any, count: int) -> Batch:
        chosen = [split.items[i] for i in range(0, len(split), len(split) // count)][:count]
        found = tokenizer(
            chosen, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
        )
        return Batch({key: found[key] for key in ("input_ids", "attention_mask")})

    seen, asked = texts(data.train, 256), texts(data.test, 300)
    target = family.build(family.narrow(parent.config, Shape(192, 6, 768, 6)))
    parents = [Parent("minilm", parent)]
    refit(parents, target, family, lambda: seen.split(32), Settings(), n_batches=8)
    # 0.82 measured with 256 texts, 0.84 with 1024; random features give 0.12
    assert spearman(parent, target, asked) > 0.75
