"""Every choice of the refit engine, in float64: exact where theory says so, refused where not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import duplicate, images, logits, maps_of, moved, permute, random_vit

from slimfuse.families import ViT
from slimfuse.fuse import fits
from slimfuse.fuse import refit as engine
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.fits import Draw
from slimfuse.fuse.gauge import aligned, average
from slimfuse.fuse.labels import LabelUnion, MeanLogits
from slimfuse.fuse.refit import Parent, Settings, refit
from slimfuse.fuse.repair import repair
from slimfuse.transport import Solver

FUSED = 1e-5  # the contract's relative bound; measured values are below 1e-9
HEADS = {"num_attention_heads": 6, "head_dim": 5}
MLP = {"intermediate_size": 34}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def fuse(
    parents: list[Any], config: Any, *, n: int = 48, goals: Any = None, **settings: Any
) -> Any:
    family = ViT()
    target = family.build(config).double()
    x = images(n, seed=7)
    fusion = refit(
        [Parent(f"p{i}", m) for i, m in enumerate(parents)], target, family,
        lambda: x.split(16), Settings(**settings), n_batches=n // 16, goals=goals,
    )  # fmt: skip
    return target, fusion


def idle_block(model: Any, after: int) -> Any:
    """Return the same function with a block more that adds nothing to the stream."""
    depth = model.config.num_hidden_layers
    sizes = {**model.config.to_diff_dict(), "num_hidden_layers": depth + 1}
    deeper = random_vit(seed=9, **sizes)
    state, out = model.state_dict(), deeper.state_dict()
    for name in out:
        head, _, tail = name.partition("vit.layers.")
        if not tail:
            out[name] = state[name]
            continue
        layer, rest = tail.split(".", 1)
        if int(layer) == after:
            if rest.startswith(("attention.o_proj", "mlp.fc2")):
                out[name] = torch.zeros_like(out[name])
        else:
            source = int(layer) - (int(layer) > after)
            out[name] = state[f"{head}vit.layers.{source}.{rest}"]
    deeper.load_state_dict(out)
    return deeper


@pytest.mark.parametrize("units", ["cholesky", "magnitude", "saliency", "ot", "cluster"])
def test_every_choice_of_units_undoes_doubled_mlp_units(vit: Any, units: str) -> None:
    wide = moved(vit, maps_of(vit, ("mlp",), lambda n, _seed: duplicate(n)), **MLP)
    x = images(9)
    if units in ("magnitude", "saliency"):  # twins score alike: both may stay, both may go
        assert gap(logits(fuse([wide], wide.config, units=units)[0], x), logits(vit, x)) < FUSED
        return
    assert gap(logits(fuse([wide], vit.config, units=units)[0], x), logits(vit, x)) < FUSED


def test_soft_units_are_not_exact(vit: Any) -> None:
    soft = fuse([vit], vit.config, units="ot", solver=Solver("sinkhorn", reg=0.5))[0]
    x = images(9)
    assert gap(logits(soft, x), logits(vit, x)) > 1e-3


@pytest.mark.parametrize("heads", ["drop", "merge"])
def test_doubled_heads_are_dropped_or_merged_without_loss(vit: Any, heads: str) -> None:
    wide = moved(vit, maps_of(vit, ("head",), lambda n, _seed: duplicate(n)), **HEADS)
    x = images(9)
    assert gap(logits(fuse([wide], vit.config, heads=heads)[0], x), logits(vit, x)) < FUSED


def test_merging_joins_the_heads_that_were_not_kept() -> None:
    model = random_vit(hidden_size=16, num_attention_heads=4)
    config = ViT().narrow(model.config, replace(ViT().shape(model.config), num_attention_heads=2))
    merged, dropped = (fuse([model], config, heads=h)[0] for h in ("merge", "drop"))
    assert gap(logits(merged, images(9)), logits(dropped, images(9))) > 1e-6


def test_gradient_directions_keep_everything_at_equal_width(vit: Any) -> None:
    target, fusion = fuse([vit], vit.config, stream="gradient-pca")
    x = images(9)
    assert gap(logits(target, x), logits(vit, x)) < FUSED
    assert fusion.stream.kept > 1 - 1e-9


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_block_that_adds_nothing_is_fused_away(vit: Any, after: int) -> None:
    deeper, x = idle_block(vit, after), images(9)
    assert gap(logits(deeper, x), logits(vit, x)) < 1e-12  # float64: the helper is exact
    layers = tuple((i, i + 1) if i == after else (i + (i > after),) for i in range(2))
    if after == 2:
        layers = ((0,), (1, 2))
    target, fusion = fuse([deeper], vit.config, layers=layers)
    assert [list(r) for r in fusion.segments[0]] == [list(p) for p in layers]
    assert gap(logits(target, x), logits(vit, x)) < FUSED


def test_idle_blocks_are_found_by_similarity(vit: Any) -> None:
    deeper, x = idle_block(vit, 1), images(9)
    assert gap(logits(fuse([deeper], vit.config)[0], x), logits(vit, x)) < FUSED


def test_parents_of_different_depth_and_width_that_are_one_function(vit: Any) -> None:
    deeper = idle_block(vit, 1)
    wide = moved(
        vit, maps_of(vit, ("resid",), lambda n, _seed: duplicate(n)), hidden_size=30, head_dim=5
    )
    x = images(9)
    for parents in ([wide, deeper], [wide, vit, deeper]):
        assert gap(logits(fuse(parents, vit.config)[0], x), logits(vit, x)) < FUSED


def test_a_shallow_parent_gives_nothing_to_the_blocks_it_lacks(vit: Any) -> None:
    deep = random_vit(seed=3, num_hidden_layers=3)
    _, fusion = fuse([deep, vit], deep.config)
    assert sum(len(r) for r in fusion.segments[1]) == 2 and len(fusion.segments[1]) == 3


def test_classes_in_another_order_are_brought_back(vit: Any) -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    other = moved(vit, maps_of(vit, ("resid",), permute))
    with torch.no_grad():
        other.classifier.weight.copy_(other.classifier.weight[order])
        other.classifier.bias.copy_(other.classifier.bias[order])
    x = images(9)
    union = LabelUnion.fit([logits(vit, x), logits(other, x)], [torch.arange(7), order])
    fused = logits(fuse([vit, other], vit.config, goals=union)[0], x)
    want = logits(vit, x)
    centred = want - want.mean(1, keepdim=True)
    assert gap(fused - fused.mean(1, keepdim=True), centred) < FUSED
    plain = logits(fuse([vit, other], vit.config)[0], x)
    assert gap(plain - plain.mean(1, keepdim=True), centred) > 0.1


def test_streams_on_disk_give_the_same_model(vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    class Filed(StreamCache):
        def __init__(self, folder: Path | None) -> None:
            super().__init__(limit=0, folder=folder)

        def close(self) -> None:
            kept.append(self.on_disk)
            super().close()

    in_memory = fuse([vit], vit.config)[0].state_dict()
    monkeypatch.setattr(engine, "StreamCache", Filed)
    filed = fuse([vit], vit.config)[0].state_dict()
    assert kept[0] > 0
    assert all(torch.equal(a, filed[name]) for name, a in in_memory.items())


def test_fewer_rows_are_drawn_where_they_are_dear(
    vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "WORK", 1.0)  # every covariance is too dear: 3 rows for each column
    x = images(9)
    assert gap(logits(fuse([vit], vit.config)[0], x), logits(vit, x)) < FUSED


def test_drawn_rows_keep_the_expected_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "WORK", 1.0)
    importance = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)).double() + 0.05
    importance /= importance.mean()
    draw = Draw(importance, rows=4000)
    for _ in range(100):
        draw.see(40, None)
    found = [draw(0, b, width=200) for b in range(100)]
    assert all(len(set(places.tolist())) == len(places) < 1000 for places, _ in found)
    total = sum(float(w.sum()) for _, w in found) / 100
    # Σ over 2 000 rows of mean weight 1; spread of the mean over 100 draws: about 0.3 %
    assert abs(total / 2000 - 1) < 0.02
    again = draw(0, 0, width=200)
    assert torch.equal(again[0], found[0][0]) and torch.equal(again[1], found[0][1])


def test_a_damaged_copy_is_repaired(vit: Any) -> None:
    damaged = random_vit(seed=4)
    state = {
        name: value if "embeddings" in name or "norm" in name else damaged.state_dict()[name]
        for name, value in vit.state_dict().items()
    }
    damaged.load_state_dict(state)
    x, given = images(9), images(96, seed=7)
    assert gap(logits(damaged, x), logits(vit, x)) > 0.1
    parts = repair([Parent("a", vit)], damaged, ViT(), lambda: given.split(16))
    assert gap(logits(damaged, x), logits(vit, x)) < FUSED
    assert {p.part for p in parts} == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2",
                                       "classifier"}  # fmt: skip


def test_a_whole_model_is_left_untouched_where_few_samples_teach_nothing(vit: Any) -> None:
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    parts = repair([Parent("a", vit)], vit, ViT(), lambda: [images(2, seed=7)])
    assert {p.strength for p in parts} == {"untouched"}
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())


def test_random_features_are_a_control_not_a_fusion(vit: Any) -> None:
    family, x, given = ViT(), images(9), images(96, seed=7)
    target = random_vit(seed=11)
    kept = target.vit.layers[0].attention.q_proj.weight.clone()
    settings = Settings()
    fusion = refit([Parent("a", vit)], target, family, lambda: given.split(16), settings,
                   n_batches=6, random_features=True)  # fmt: skip
    assert torch.equal(target.vit.layers[0].attention.q_proj.weight, kept)
    assert gap(logits(target, x), logits(vit, x)) > 0.05
    assert {p.part for p in fusion.parts} == {"o_proj", "fc2", "classifier"}


def test_the_head_follows_the_parents_weights(vit: Any) -> None:
    goals = MeanLogits([1.0, 3.0], 7)
    a, b = torch.ones(2, 7).double(), torch.zeros(2, 7).double()
    torch.testing.assert_close(goals([a, b]), torch.full((2, 7), 0.25).double())


def test_a_canonical_model_is_left_untouched_by_its_own_parent(vit: Any) -> None:
    """In one gauge the average of one parent is that parent: nothing is to be repaired."""
    family, given = ViT(), images(48, seed=7)
    parents = [Parent("a", vit)]
    (reference,) = aligned(parents, family, lambda: given.split(16))
    model = random_vit(seed=8)
    average(parents, model, family, lambda: given.split(16))
    parts = repair([reference], model, family, lambda: given.split(16))
    assert {p.strength for p in parts} == {"untouched"}
    assert gap(logits(model, images(9)), logits(vit, images(9))) < FUSED


def test_one_sample_gives_a_finite_model(vit: Any) -> None:
    family, target = ViT(), random_vit(seed=2)
    refit([Parent("a", vit)], target, family, lambda: [images(1)], Settings(), n_batches=1)
    assert all(bool(p.isfinite().all()) for p in target.parameters())


def test_gradient_directions_of_all_parents_count(vit: Any) -> None:
    other = moved(vit, maps_of(vit, ("resid",), permute))
    half = ViT().narrow(vit.config, replace(ViT().shape(vit.config), hidden_size=9))
    alone, both = (fuse(p, half, stream="gradient-pca")[1] for p in ([vit], [vit, other]))
    # the same function twice: its directions, brought back, are its own
    assert gap(both.stream.encode.T @ both.stream.encode, alone.stream.encode.T
               @ alone.stream.encode) < 1e-6  # fmt: skip
