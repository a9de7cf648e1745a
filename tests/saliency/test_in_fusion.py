"""Saliency in fusions: the units that a refit keeps, masses of plans, shares of tensors."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from families.cases import HEADLESS
from tiny import duplicate, images, logits, maps_of, moved, random_vit
from torch import Tensor, nn

from slimfuse.families import ViT
from slimfuse.fuse.choice import keep, unit_scores
from slimfuse.fuse.refit import Parent, Settings, refit
from slimfuse.fuse.scoring import Saliency, saliencies, subject
from slimfuse.fuse.transport import TransportFusion, TransportSettings, fuse_by_transport
from slimfuse.recipe.fusing import Saliency as RecipeSaliency
from slimfuse.saliency import SCORERS
from slimfuse.saliency.diagonal import traces

FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-12
EVERY = ("resid", "head", "qk", "vo", "mlp")
WIDER = {"hidden_size": 30, "num_attention_heads": 6, "head_dim": 10, "intermediate_size": 34}
GRADIENTS = ("taylor", "diagonal-fisher", "mask-fisher")


def gap(a: nn.Module, b: nn.Module) -> float:
    x, y = (logits(m, images(9)) for m in (a, b))
    return float((x - y).abs().max() / y.abs().max())


def transported(parents: list[nn.Module], anchor: nn.Module, **settings: Any) -> Any:
    target = ViT().build(anchor.config).double()
    x = images(32, seed=7)
    named = [Parent(f"p{i}", m) for i, m in enumerate(parents)]
    found = fuse_by_transport(
        named, anchor, target, ViT(), lambda: x.split(16),
        TransportSettings(**{"anchor_weight": 0.0, **settings}), n_batches=2,
    )  # fmt: skip
    return target, found


def test_recipes_know_all_scorers() -> None:
    assert {*get_args(Saliency)} == {*get_args(RecipeSaliency)} == {*SCORERS, "uniform"}


# -- masses of plans --------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["kept", "crossed"])
@pytest.mark.parametrize("saliency", ["mask-fisher", "taylor", "l1", "uniform"])
def test_a_widened_copy_comes_back_with_masses_of_a_score(saliency: str, heads: str) -> None:
    """Sums of squared weights (magnitude, diagonal Fisher) see that other spaces were widened."""
    anchor = random_vit()
    wide = moved(anchor, maps_of(anchor, EVERY, lambda n, _s: duplicate(n)), **WIDER)
    settings = {"masses": "saliency", "saliency": saliency, "heads": heads}
    for cost in ("activations", "weights"):
        target, _ = transported([wide], anchor, cost=cost, **settings)
        assert gap(target, anchor) < FUSED


# -- shares of tensors ------------------------------------------------------------------------


def test_tensors_are_averaged_by_their_fisher_information() -> None:
    anchor, other = random_vit(), random_vit(1)
    batches = images(32, seed=7).split(16)
    target, found = transported([other], anchor, anchor_weight=0.25, parent_weights="fisher")
    t = [traces(subject(m, ViT(), lambda: batches)) for m in (anchor, other)]
    plain, _ = transported([other], anchor, anchor_weight=0.0)  # the other parent, moved
    assert isinstance(found, TransportFusion) and found.weights == (0.25, 0.75)
    moved_there, own = plain.state_dict(), anchor.state_dict()
    for name, value in target.named_parameters():
        share = 0.25 * t[0][name] / (0.25 * t[0][name] + 0.75 * t[1][name])
        assert found.tensors[name] == pytest.approx((share, 1 - share), rel=1e-9)
        mixed = share * own[name] + (1 - share) * moved_there[name]
        torch.testing.assert_close(value, mixed, rtol=1e-9, atol=1e-12)
    assert max(s[0] for s in found.tensors.values()) > 0.3  # they do differ from the weights
    assert sum(t[0].values()) / len(t[0]) == pytest.approx(1.0)


@pytest.mark.parametrize(("spaces", "wider"), [
    (("mlp",), {"intermediate_size": 34}),
    (("head",), {"num_attention_heads": 6, "head_dim": 5}),
    (("qk", "vo"), {"head_dim": 10}),
    (("resid",), {"hidden_size": 30, "head_dim": 5}),
    (EVERY, WIDER),
], ids=lambda value: "".join(value))  # fmt: skip
def test_a_wider_parent_of_the_same_function_weighs_as_much(
    spaces: tuple[str, ...], wider: dict[str, int]
) -> None:
    """Gradients of a unit's copies are parts of the unit's own: n/m of them are one."""
    anchor = random_vit()
    wide = moved(anchor, maps_of(anchor, spaces, lambda n, _s: duplicate(n)), **wider)
    _, found = transported([wide], anchor, anchor_weight=0.5, parent_weights="fisher")
    for name, (own, _) in found.tensors.items():
        if not name.endswith("k_proj.bias"):  # scores don't depend on it: its gradient is rounding
            assert own == pytest.approx(0.5, abs=1e-6), name


def test_a_model_averaged_with_itself_by_fisher_is_itself() -> None:
    anchor = random_vit()
    target, _ = transported([anchor, anchor], anchor, anchor_weight=None, parent_weights="fisher")
    assert gap(target, anchor) < FUSED


# -- choice of units --------------------------------------------------------------------------


def refitted(parents: list[nn.Module], sizes: dict[str, int], **settings: Any) -> Any:
    from tiny import vit_config

    target = ViT().build(vit_config(**sizes)).double()
    x = images(64, seed=5)
    named = [Parent(f"p{i}", m) for i, m in enumerate(parents)]
    found = refit(named, target, ViT(), lambda: x.split(32), Settings(ridge=1e-9, **settings),
                  n_batches=2)  # fmt: skip
    return target, found


@pytest.mark.parametrize("saliency", [*GRADIENTS, "energy", "magnitude", "l1", "ziplm"])
def test_units_and_heads_that_say_nothing_go_first(saliency: str) -> None:
    model = random_vit(num_attention_heads=5)
    dropped, silent = [0, 5, 6, 16], [3, 4]
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.mlp.fc2.weight[:, dropped] = 0
            layer.attention.o_proj.weight[:, [3 * h + i for h in silent for i in range(3)]] = 0
    settings = {"units": "saliency", "saliency": saliency}
    target, found = refitted([model], {"intermediate_size": 13}, **settings)
    kept = {p.part: p.sources for p in found.parts if p.layer == 0}
    assert [u for _, _, u in kept["fc1"]] == [i for i in range(17) if i not in dropped]
    assert [h for _, _, h in kept["q_proj"]] == [0, 1, 2]
    held = {p.role: p.saliency for p in found.parts if p.sources}
    assert held == pytest.approx(dict.fromkeys(("q", "k", "v", "up"), 1.0))
    assert gap(target, model) < 1e-4  # the ridge of 1e-9; heads of 3 units sit in 5


def test_what_the_kept_units_hold_is_their_share_of_all_scores() -> None:
    model = random_vit()
    _, found = refitted([model], {"intermediate_size": 9}, units="saliency", saliency="uniform")
    shares = [p.saliency for p in found.parts if p.role == "up"]
    assert shares == pytest.approx([9 / 17] * len(shares))  # of 17 units that count alike
    for saliency in ("energy", "taylor"):  # the best 9 hold more than any 9 do on average
        _, found = refitted([model], {"intermediate_size": 9}, units="saliency", saliency=saliency)
        assert all(9 / 17 < p.saliency < 1 for p in found.parts if p.role == "up")
    _, plain = refitted([model], {"intermediate_size": 9})
    assert {p.saliency for p in plain.parts} == {None}


def test_random_choice_is_a_control_that_keeps_other_units() -> None:
    model = random_vit()
    sources = []
    for saliency in ("random", "random", "mask-fisher"):
        found = refitted([model], {"intermediate_size": 9}, units="saliency", saliency=saliency)[1]
        sources.append(next(p.sources for p in found.parts if p.part == "fc1"))
    assert sources[0] == sources[1] != sources[2]


def test_zip_keeps_what_is_left_after_the_cheapest_have_gone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(50, 7, generator=generator).double()
        @ torch.randn(7, 7, generator=generator).double()
    )
    cov, out = x.T @ x / 50, torch.randn(4, 7, generator=generator).double()
    singles = list(torch.arange(7)[:, None])
    kept = keep("ziplm", cov, out, singles, 6)
    missed = []
    for unit in range(7):
        rest = [i for i in range(7) if i != unit]
        back = cov[unit, rest] @ torch.linalg.inv(cov[rest][:, rest])
        missed.append(
            float(out[:, unit].square().sum() * (cov[unit, unit] - back @ cov[rest, unit]))
        )
    assert kept == [i for i in range(7) if i != min(range(7), key=missed.__getitem__)]
    ranked = unit_scores("ziplm", cov, out, singles)
    assert sorted(ranked.topk(4).indices.tolist()) == keep("ziplm", cov, out, singles, 4)


@pytest.mark.parametrize("units", ["ot", "cluster"])
def test_merging_goes_by_the_masses_of_a_score(units: str) -> None:
    model = random_vit()
    found = {
        s: refitted([model], {"intermediate_size": 9}, units=units, saliency=s)[0]
        for s in ("energy", "uniform", "mask-fisher")
    }
    x = images(4)
    answers = [logits(m, x) for m in found.values()]
    assert all(bool(torch.isfinite(a).all()) for a in answers)
    assert not torch.allclose(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2])


def test_parents_share_a_space_by_their_weights() -> None:
    """Losses of different models have no common unit, so totals are the parents' weights."""
    models = [random_vit(), random_vit(1, hidden_size=18, intermediate_size=11)]
    x = images(12)
    found = saliencies(models, ViT(), lambda: [x], "mask-fisher", [1.0, 3.0])
    for scores, weight in zip(found, (1.0, 3.0), strict=True):
        for stem in ("mlp", "head"):
            total = sum(float(scores[f"{stem}.{i}"].sum()) for i in range(2))
            assert total == pytest.approx(weight)
    one = saliencies(models[:1], ViT(), lambda: [x], "mask-fisher", [1.0])[0]
    ratio = one["mlp.0"] / found[0]["mlp.0"]
    torch.testing.assert_close(ratio, ratio[0].expand(17), rtol=1e-9, atol=0)
    assert saliencies(models, ViT(), lambda: [x], "uniform", [1.0, 1.0]) == [{}, {}]


@pytest.mark.parametrize("case", HEADLESS, ids=lambda c: c.name)
def test_models_without_a_head_are_scored_by_their_features(case: Any) -> None:
    model = case.parent()
    batch = case.batch(5)
    (found,) = saliencies([model], case.family, lambda: [batch], "mask-fisher", [1.0])
    scores: list[Tensor] = [v for n, v in found.items() if n.startswith(("mlp", "head."))]
    assert scores and all(float(v.max()) > 0 for v in scores)


def test_random_scores_differ_by_seed_and_by_parent() -> None:
    models, x = [random_vit(), random_vit(1)], images(12)
    found = [
        scores["mlp.0"].argsort().tolist()
        for seed in (0, 1)
        for scores in saliencies(models, ViT(), lambda: [x], "random", [1.0, 1.0], seed=seed)
    ]
    assert len({tuple(order) for order in found}) == 4
