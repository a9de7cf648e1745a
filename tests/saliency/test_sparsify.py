"""The driver: exact shares, patterns, schedules, passes, interruptions."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saliency.small_nets import dense_fisher, loss, mlp, pairs, rows, singles
from torch import Tensor, nn

from slimfuse.errors import ShapeError, UserError
from slimfuse.saliency import sparsify as driver
from slimfuse.saliency.fisher import Sums, accumulate
from slimfuse.saliency.inverse import Damping, invert
from slimfuse.saliency.masks import Masks
from slimfuse.saliency.obs import statistic, update
from slimfuse.saliency.patterns import Pattern, parse_pattern, prunable
from slimfuse.saliency.sparsify import Sparsified, sparsify, weight_scores
from slimfuse.saliency.sparsify_spec import Spec, cubic
from slimfuse.saliency.weight_scores import WEIGHT_SCORERS

DATA = pairs(40, 8, 4)
BATCHES = singles(DATA)
SCORERS = sorted(WEIGHT_SCORERS)


def net() -> nn.Sequential:
    return mlp(8, 12, 8, 4)


def pruned(spec: Spec, **more: Any) -> tuple[nn.Sequential, Sparsified]:
    model = net()
    return model, sparsify(model, loss, lambda: BATCHES, spec, **more)


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {la.name: model.get_parameter(la.name).detach() == 0 for la in prunable(model)}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("update_", ["joint", "single", "none"])
def test_the_share_of_zeros_is_exact(scorer: Any, joint: bool, update_: Any) -> None:
    spec = Spec(0.7, scorer, joint=joint, update=update_, block=10)
    model, found = pruned(spec)
    found.masks.check(model)
    sizes = {la.name: la.size for la in prunable(model)}
    gone = {name: int(z.sum()) for name, z in zeros(model).items()}
    if joint:
        assert sum(gone.values()) == round(0.7 * sum(sizes.values()))
    else:
        assert gone == {name: round(0.7 * size) for name, size in sizes.items()}
    for record in found.layers:
        assert record.weights - record.kept == gone[record.name]
        assert record.sparsity == pytest.approx(found.masks.sparsities()[record.name])
        assert (record.increase is None) == (update_ == "none")
    (step,) = found.steps
    assert step.sparsity == pytest.approx(found.masks.sparsity)
    assert torch.equal(model[0].bias, net()[0].bias)


def test_woodfisher_is_its_formulas() -> None:
    spec = Spec(0.5, block=16, damping=Damping(0.1))
    model, found = pruned(spec)
    before, ranked = net(), []
    for layer in prunable(before):
        x = rows(before, DATA, layer)
        damping = 0.1 * compared(before, x)
        inverse = invert(x, 16, damping)
        w = before.get_parameter(layer.name).detach().view(-1, 16)
        ranked.append(statistic(inverse, w).flatten())
        kept = found.masks[layer.name].view(-1, 16)
        truth = update(inverse, w, kept).view(layer.shape)
        torch.testing.assert_close(model.get_parameter(layer.name).detach(), truth,
                                   rtol=1e-9, atol=1e-12)  # fmt: skip
        record = next(r for r in found.layers if r.name == layer.name)
        assert record.damping == pytest.approx(damping)
        change = truth.flatten() - w.flatten()
        dense = dense_fisher(x, 16, damping)
        assert record.increase == pytest.approx(float(0.5 * change @ dense @ change))
    scores = torch.cat(ranked)
    kept = torch.cat([m.flatten() for m in found.masks.values()])
    assert scores[~kept].max() < scores[kept].min()  # one ranking over all layers
    told = weight_scores(net(), loss, lambda: BATCHES, spec)
    torch.testing.assert_close(torch.cat([t.flatten() for t in told.values()]), scores)
    for record in found.layers:
        own, mask = told[record.name], found.masks[record.name]
        assert record.saliency == pytest.approx(float(own[mask].sum() / own.sum()))


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("memory", [1, 1 << 20])  # a pass a block, or one for all
@pytest.mark.parametrize("scorer", ["woodfisher", "diagonal-fisher", "woodtaylor"])
def test_damping_is_relative_to_what_is_compared(scorer: Any, memory: int, joint: bool) -> None:
    spec = Spec(0.5, scorer, joint=joint, block=16, damping=Damping(0.1), memory=memory)
    model, found = pruned(spec)
    for layer, record in zip(prunable(model), found.layers, strict=True):
        own = float(rows(net(), DATA, layer).square().mean())
        wanted = (own * mean_square(net())) ** 0.5 if joint else own
        assert record.damping == pytest.approx(0.1 * wanted, rel=1e-9)


def mean_square(model: nn.Module) -> float:
    """Return the mean of g² over all layers' weights and samples."""
    return float(torch.cat([rows(model, DATA, la) for la in prunable(model)], 1).square().mean())


def compared(model: nn.Module, x: Tensor) -> float:
    """Return the geometric mean of a layer's mean g² and that of all layers."""
    return (float(x.square().mean()) * mean_square(model)) ** 0.5


@pytest.mark.parametrize(("scorer", "expected"), [
    ("magnitude", lambda w, x, mean: w.square() / 2),
    ("diagonal-fisher", lambda w, x, mean: w.square() * (mean / 10 + x.square().mean(0)) / 2),
])  # fmt: skip
def test_first_order_scores_are_their_formulas(
    scorer: Any, expected: Callable[[Tensor, Tensor, float], Tensor]
) -> None:
    model = net()
    found = weight_scores(model, loss, lambda: BATCHES, Spec(0.5, scorer))
    for layer in prunable(model):
        x = rows(model, DATA, layer)
        truth = expected(model.get_parameter(layer.name).detach().flatten(), x,
                         compared(model, x))  # fmt: skip
        torch.testing.assert_close(found[layer.name].flatten(), truth, rtol=1e-10, atol=0)


def test_scores_need_no_batches_where_they_look_at_none() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("called")

    for scorer in ("magnitude", "random"):
        sparsify(net(), never, never, Spec(0.5, scorer))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no batch"):
        sparsify(net(), loss, list, Spec(0.5))


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 2)])
def test_exactly_n_of_m_stay(scorer: Any, steps: int, keep: int, of: int) -> None:
    spec = Spec(scorer=scorer, pattern=Pattern(1, of, keep), block=10, steps=steps)
    model, found = pruned(spec)
    for name, gone in zeros(model).items():
        assert ((~gone).view(-1, of).sum(1) == keep).all(), name
    assert found.masks.sparsity == spec.final == 1 - keep / of


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("text", ["4x1", "1x4", "2x2"])
def test_blocks_go_whole(scorer: Any, text: str) -> None:
    pattern = parse_pattern(text)
    model, found = pruned(Spec(0.5, scorer, pattern=pattern, block=10))
    for layer in prunable(model):
        flat = pattern.flat(layer, zeros(model)[layer.name][None])[0].view(-1, 4)
        assert (flat.all(1) | ~flat.any(1)).all()
    assert found.masks.sparsity == 0.5


def test_layers_that_do_not_fit_a_pattern_are_refused() -> None:
    with pytest.raises(ShapeError, match="can't be cut"):
        sparsify(mlp(6, 5, 4), loss, lambda: BATCHES, Spec(0.5, pattern=Pattern(1, 4)))


@pytest.mark.parametrize("scorer", SCORERS)
def test_steps_follow_the_cubic_and_nothing_returns(scorer: Any) -> None:
    seen: list[Masks] = []

    def train(model: nn.Module, masks: Masks, step: int) -> None:
        masks.check(model)
        assert step == len(seen) + 1
        seen.append(masks)
        hold = masks.holding(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss(model, DATA).backward()
        optimizer.step()
        hold()

    spec = Spec(0.8, scorer, steps=4, initial=0.2, block=10)
    model, found = pruned(spec, between=train)
    found.masks.check(model)
    assert len(seen) == 3
    for before, after in zip(seen, [*seen[1:], found.masks], strict=True):
        assert all((after[name] <= before[name]).all() for name in before)
    total = sum(la.size for la in prunable(model))
    for step, record in enumerate(found.steps, start=1):
        goal = 0.8 - 0.6 * (1 - step / 4) ** 3
        assert record.sparsity == pytest.approx(round(goal * total) / total)


def test_training_that_loses_the_masks_is_told() -> None:
    def careless(model: nn.Module, _masks: Masks, _step: int) -> None:
        with torch.no_grad():
            model.get_parameter("0.weight").add_(1)

    with pytest.raises(UserError, match="masks were lost"):
        pruned(Spec(0.5, steps=2), between=careless)


def test_weights_that_went_before_stay_gone_and_count() -> None:
    first = pruned(Spec(0.6, "magnitude"))[1].masks
    _, found = pruned(Spec(0.75, block=10), masks=first)
    assert all((found.masks[name] <= first[name]).all() for name in first)
    assert found.masks.sparsity == 0.75
    # fewer than went before: none returns
    assert pruned(Spec(0.1), masks=first)[1].masks.sparsity == pytest.approx(first.sparsity)


def test_the_cubic_ends_where_it_should() -> None:
    assert cubic(0, 8, 0.1, 0.9) == pytest.approx(0.1) and cubic(8, 8, 0.1, 0.9) == 0.9
    rises = [cubic(t + 1, 8, 0.1, 0.9) - cubic(t, 8, 0.1, 0.9) for t in range(8)]
    assert rises == sorted(rises, reverse=True)


@pytest.mark.parametrize("scorer", ["woodfisher", "woodtaylor", "diagonal-fisher", "magnitude"])
@pytest.mark.parametrize("joint", [True, False])
def test_passes_change_nothing(scorer: Any, joint: bool) -> None:
    def told(memory: int) -> tuple[nn.Module, Sparsified]:
        return pruned(Spec(0.6, scorer, joint=joint, update="joint", block=10, memory=memory))

    (one, a), (many, b) = told(1 << 30), told(20_000)
    for name, p in one.named_parameters():
        # even a layer that was cut, whose λ is summed in another order
        torch.testing.assert_close(p, many.get_parameter(name), rtol=1e-9, atol=1e-12)
    assert a.steps[0].increase == pytest.approx(b.steps[0].increase)
    assert [r.kept for r in a.layers] == [r.kept for r in b.layers]


@pytest.mark.parametrize("block", [10, None])
@pytest.mark.parametrize("scorer", ["woodfisher", "woodtaylor"])
def test_routes_agree(scorer: Any, block: int | None) -> None:
    found = [pruned(Spec(0.6, scorer, block=block, route=route))[0] for route in
             ("gram", "samples")]  # fmt: skip
    for name, p in found[0].named_parameters():
        # float64; a route's rounding times a condition of 1e3 to 1e4
        torch.testing.assert_close(p, found[1].get_parameter(name), rtol=1e-8, atol=1e-10)


def test_the_model_may_be_half_precision() -> None:
    model = net().to(torch.bfloat16)
    batches = [(x.bfloat16(), y) for x, y in BATCHES]
    found = sparsify(model, loss, lambda: batches, Spec(0.5, block=10))
    found.masks.check(model)
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in model.parameters())


class Stop(Exception):
    """Somebody pulled the plug."""


CASES = {
    "gradual": Spec(0.8, steps=3, block=10, memory=20_000),
    "n of m": Spec(scorer="woodtaylor", pattern=Pattern(1, 4, 2), block=10, memory=20_000, steps=2),
    "independent": Spec(0.7, joint=False, block=10, memory=20_000),
    "random": Spec(0.7, "random", update="joint", block=10),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_with_the_same_bytes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CASES[case]
    monkeypatch.setattr(driver, "CHECKPOINT_SECONDS", 0.0)

    def train(model: nn.Module, masks: Masks, step: int) -> None:
        with torch.no_grad():
            model.get_parameter("0.bias").add_(step)
        masks.apply(model)

    undisturbed, whole = pruned(spec, between=train, checkpoint=tmp_path / "a.safetensors")
    save, calls, total = driver._Run.save, [0], [0]

    def counted(self: Any, **more: Any) -> None:
        save(self, **more)
        calls[0] += 1
        if calls[0] in {total[0] + 1, total[0] + 4}:  # twice, ever later
            total[0] = calls[0]
            raise Stop

    monkeypatch.setattr(driver._Run, "save", counted)
    path, kills = tmp_path / "b.safetensors", 0
    while True:
        model = net()
        try:
            found = sparsify(model, loss, lambda: BATCHES, spec, between=train, checkpoint=path)
            break
        except Stop:
            kills += 1
            total[0] = calls[0] + kills % 3  # progress between kills
        assert kills < 60
    assert kills >= 2
    assert (tmp_path / "a.safetensors").read_bytes() == path.read_bytes()
    for name, p in undisturbed.named_parameters():
        assert torch.equal(p, model.get_parameter(name))
    assert found.layers == whole.layers and found.steps == whole.steps
    assert all(found.masks[name].equal(whole.masks[name]) for name in whole.masks)


def test_a_checkpoint_of_other_settings_or_damaged_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    pruned(Spec(0.3), checkpoint=path)
    reference = pruned(Spec(0.6))[0]
    for damage in (False, True):
        if damage:
            path.write_bytes(path.read_bytes()[:50])
        model, found = pruned(Spec(0.6), checkpoint=path)
        assert found.masks.sparsity == pytest.approx(0.6, abs=1e-2)
        assert torch.equal(model[0].weight, reference[0].weight)


@pytest.mark.parametrize("bad", [
    {}, {"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": 0.5, "steps": 0},
    {"sparsity": 0.5, "initial": 0.6}, {"sparsity": 0.5, "block": 0},
    {"sparsity": 0.5, "scorer": "woodfish"}, {"sparsity": 0.5, "route": "rank-one"},
    {"sparsity": 0.6, "pattern": Pattern(1, 4, 2)},
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Spec(**bad)


def test_a_pass_over_gradients_tells_what_it_costs() -> None:
    """One pass where all sums fit; else two a pass of parts, and one for the mean g² of all."""
    calls = [0]

    def counted() -> list[tuple[Tensor, Tensor]]:
        calls[0] += 1
        return BATCHES

    model = copy.deepcopy(net())
    sparsify(model, loss, counted, Spec(0.5, block=10))
    assert calls[0] == 2  # one of them to count
    calls[0] = 0
    passes = math.ceil(sum(la.size for la in prunable(model)) * (10 + 32) * 8 / 30_000)
    sparsify(net(), loss, counted, Spec(0.5, block=10, memory=30_000))
    assert calls[0] in {2 + 2 * passes, 2 + 2 * (passes + 1)}


@pytest.mark.parametrize("scorer", ["woodfisher", "woodtaylor"])
@pytest.mark.parametrize("joint", [True, False])
def test_the_sums_of_one_pass_are_gone_before_the_next_are_made(
    monkeypatch: pytest.MonkeyPatch, scorer: Any, joint: bool
) -> None:
    seen: list[weakref.ref[Sums]] = []

    def watched(*given: Any, **more: Any) -> dict[str, Sums]:
        assert [ref for ref in seen if ref() is not None] == []
        found = accumulate(*given, **more)
        seen.extend(weakref.ref(own) for own in found.values())
        return found

    monkeypatch.setattr(driver, "accumulate", watched)
    pruned(Spec(0.5, scorer, joint=joint, block=10, memory=20_000))
    assert len(seen) > 4
