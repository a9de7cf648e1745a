"""Hidden states through the fusion's maps: exact, turned, masked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families.cases import Case, every_refit, permuted, those
from torch import Tensor, nn

from slimfuse.batch import Batch, call, token_mask
from slimfuse.families import Shape
from slimfuse.finetune.hidden import Hidden, Source, observing
from slimfuse.fuse.refit import Fusion, Parent, Settings, refit
from slimfuse.pipeline.fusion_record import stream_tensors

FUSED = 1e-8  # squares of float64 refits' errors, which the contract bounds by 1e-5


def blocks(case: Case, config: Any) -> tuple[str, ...]:
    return tuple(block.path for block in case.family.layout(config).blocks)


def made(case: Case, parents: list[Any], config: Any) -> tuple[Any, Hidden, Fusion]:
    """Return a child, what it shall be taught, and its fusion."""
    target, x = case.family.build(config).double(), case.batch(64)
    named = [Parent(f"p{i}", model) for i, model in enumerate(parents)]
    layout = case.family.layout(config)
    settings = Settings(stream="select" if layout.norm_order == "post" else "pca", ridge=1e-3)
    done = refit(named, target, case.family, lambda: x.split(16), settings, n_batches=4)
    told = stream_tensors(done.mixes, done.segments, [p.name for p in named])
    sources = tuple(
        Source(
            p.name, blocks(case, p.model.config), told[f"mix.{p.name}"],
            tuple(told[f"depths.{p.name}"].tolist()),
        )
        for p in named
    )  # fmt: skip
    centred = layout.norm_order == "pre" and layout.norm == "layer"
    return target, Hidden(blocks(case, config), sources, 1.0, centred), done


def seen(model: nn.Module, paths: tuple[str, ...], x: Batch) -> dict[int, Tensor]:
    with torch.no_grad(), observing(model, paths) as found:
        call(model, x)
    return found


def apart(hidden: Hidden, child: nn.Module, parents: list[Any], x: Batch) -> float:
    streams = [seen(p, s.blocks, x) for p, s in zip(parents, hidden.sources, strict=True)]
    own = seen(child, hidden.blocks, x)
    return float(hidden.distance(own, hidden.goals(streams), token_mask(x)))


@every_refit
def test_a_child_that_is_its_parent_has_its_hidden_states(case: Case) -> None:
    parent, x = case.parent(), case.batch(9)
    child, hidden, _ = made(case, [parent], case.config())
    # goals are float32
    assert apart(hidden, child, [parent], x) < FUSED
    torch.manual_seed(0)
    assert apart(hidden, case.family.build(case.config()).double(), [parent], x) > 0.3


@those(lambda case: case.refits and not case.keeps)
def test_two_parents_teach_one_stream(case: Case) -> None:
    parent, x = case.parent(), case.batch(9)
    other = permuted(case, parent, ("resid", "pool", "mlp", "qk", "vo", "head", "embed"))
    child, hidden, _ = made(case, [parent, other], case.config())
    assert len(hidden.sources) == 2
    assert apart(hidden, child, [parent, other], x) < FUSED


@those(lambda case: case.name in ("vit", "bert", "roberta-body"))
def test_a_shallow_child_faces_the_ends_of_its_parents_segments(case: Case) -> None:
    parent, x = case.model(Shape(15, 3, 17, 5)), case.batch(9)
    config = case.config(Shape(15, 3, 17, 2))
    child, hidden, done = made(case, [parent], config)
    ends = [segment.stop for segment in done.segments[0]]
    assert list(hidden.sources[0].depths) == ends and ends[-1] == 5 and len(ends) == 2
    streams = seen(parent, hidden.sources[0].blocks, x)
    assert sorted(streams) == [0, 1, 2, 3, 4, 5]
    goals = hidden.goals([streams])
    mix = hidden.sources[0].mix.double()
    for goal, end in zip(goals, ends, strict=True):
        torch.testing.assert_close(goal.double(), streams[end] @ mix.T, rtol=1e-4, atol=1e-5)
    assert apart(hidden, child, [parent], x) < 1


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def taught(centred: bool = False) -> Hidden:
    return Hidden(("one", "two"), (Source("p", ("a", "b"), torch.eye(6), (1, 2)),), 1.0, centred)


@pytest.mark.parametrize("centred", [False, True])
def test_a_turned_stream_is_turned_back(centred: bool) -> None:
    turn = torch.linalg.qr(numbers(6, 6).double())[0]
    if centred:  # a turn that keeps the mean over channels where it is
        ones = torch.full((6, 1), 6**-0.5, dtype=torch.float64)
        basis = torch.linalg.qr(torch.cat([ones, numbers(6, 5).double()], 1))[0][:, 1:]
        inner = torch.linalg.qr(numbers(5, 5, seed=1).double())[0]
        turn = ones @ ones.T + basis @ inner @ basis.T
    goals = [tuple(numbers(40, 6, seed=b + 2 * i) for b in range(2)) for i in range(3)]
    own = [{b + 1: (g.double() @ turn.T).float() for b, g in enumerate(one)} for one in goals]
    hidden = taught(centred)
    far = float(hidden.distance(own[0], goals[0], None))
    near = float(hidden.turned(own, goals).distance(own[0], goals[0], None))
    assert far > 0.5 and near < 1e-10


def test_what_only_pads_does_not_count() -> None:
    goals = (numbers(2, 3, 6), numbers(2, 3, 6, seed=1))
    own = {b + 1: g + 0.1 for b, g in enumerate(goals)}
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    want = float(taught().distance(own, goals, mask))
    for block in own:
        own[block] = torch.where(mask[..., None], own[block], torch.full((), 1e3))
    assert float(taught().distance(own, goals, mask)) == want
    assert float(taught().distance(own, goals, None)) > 1e3


def test_the_distance_is_that_of_its_formula() -> None:
    goals = (numbers(2, 3, 6), numbers(2, 3, 6, seed=1))
    own = {1: numbers(2, 3, 6, seed=2), 2: numbers(2, 3, 6, seed=3)}
    want = sum(
        float((own[b + 1] - g).square().sum() / g.square().sum()) for b, g in enumerate(goals)
    )
    assert float(taught().distance(own, goals, None)) == pytest.approx(want / 2, rel=1e-5)
    nothing = {b + 1: torch.zeros(2, 3, 6) for b in range(2)}
    assert float(taught().distance(nothing, goals, None)) == pytest.approx(1)


def test_the_mean_over_channels_counts_only_without_a_layer_norm_behind_it() -> None:
    goals = (numbers(2, 3, 6), numbers(2, 3, 6, seed=1))
    own = {b + 1: g + 5 for b, g in enumerate(goals)}
    assert float(taught(True).distance(own, goals, None)) < 1e-10
    assert float(taught(False).distance(own, goals, None)) > 1


def test_hooks_leave_with_the_pass() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with observing(net, ("0", "1")) as found:
        net(torch.ones(1, 3))
    assert sorted(found) == [0, 1, 2]
    found.clear()
    net(torch.ones(1, 3))
    assert not found and not net[0]._forward_hooks and not net[0]._forward_pre_hooks
    with observing(net, ()) as nothing:
        net(torch.ones(1, 3))
    assert nothing == {}


def test_a_weight_and_a_turn_are_no_part_of_the_maps() -> None:
    hidden = replace(taught(), turn=torch.eye(6))
    goals = (numbers(2, 3, 6), numbers(2, 3, 6, seed=1))
    own = {1: numbers(2, 3, 6, seed=2), 2: numbers(2, 3, 6, seed=3)}
    assert float(hidden.distance(own, goals, None)) == pytest.approx(
        float(taught().distance(own, goals, None)), rel=1e-6
    )
