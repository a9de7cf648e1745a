"""ZipLM: joint = sequential = ridge least squares on what is kept; order by brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saliency.asked import asked_vit
from torch import Tensor

from slimfuse.fuse.solve import ridge
from slimfuse.saliency import score
from slimfuse.saliency.activity import second_moments
from slimfuse.saliency.ziplm import eliminate, inverse_second, joint_cost, refitted

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, exact identities


def problem(n: int, p: int, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Return E[x xᵀ] of correlated units and weights (p, n)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, rank or n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(rank or n, n, generator=generator, dtype=torch.float64)
    out = torch.randn(p, n, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x), out


def least(second: Tensor, out: Tensor, kept: list[int], damping: float) -> tuple[Tensor, Tensor]:
    """Return the ridge least squares about W on the kept units, and what it misses."""
    gram = second[kept][:, kept]
    # `ridge` damps by the mean diagonal of what it is given, `eliminate` by that of all
    strength = damping * second.diagonal().mean() / gram.diagonal().mean()
    weight = ridge(out @ second[:, kept], gram, out[:, kept], float(strength))
    gap = out.clone()
    gap[:, kept] -= weight
    scale = damping * second.diagonal().mean()
    damped = second + scale * torch.eye(len(second)).double()
    return weight, (gap @ damped * gap).sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 23), st.integers(1, 31), st.sampled_from([1e-4, 1e-2, 1.0]), st.data())
def test_joint_is_sequential_is_ridge_on_what_is_kept(
    n: int, p: int, damping: float, data: st.DataObject
) -> None:
    second, out = problem(n, p, seed=n * p)
    gone = data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, n - 1))]
    kept = sorted(set(range(n)) - set(gone))
    inverse = inverse_second(second, damping)
    weight, missed = least(second, out, kept, damping)
    joint = refitted(inverse, out, torch.tensor(gone))
    torch.testing.assert_close(joint[:, kept], weight, rtol=1e-8, atol=1e-9)  # condition 1e4 … 1e6
    torch.testing.assert_close(
        joint_cost(inverse, out, torch.tensor(gone)), missed, rtol=1e-8, atol=0
    )
    one, total = out, 0.0
    for unit in gone:
        index = torch.tensor([unit])
        total += joint_cost(inverse, one, index)
        one = refitted(inverse, one, index)
        inverse = inverse - torch.outer(inverse[:, unit], inverse[unit]) / inverse[unit, unit]
        inverse[unit, unit] = 1.0  # gone: never asked again
    torch.testing.assert_close(one, joint, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(torch.as_tensor(total), missed, rtol=1e-8, atol=0)


def test_the_identities_to_the_bound_of_the_design() -> None:
    second, out = problem(13, 9)
    gone, kept = [1, 4, 5, 12], [0, 2, 3, 6, 7, 8, 9, 10, 11]
    inverse = inverse_second(second, 1e-2)
    weight, missed = least(second, out, kept, 1e-2)
    torch.testing.assert_close(refitted(inverse, out, torch.tensor(gone))[:, kept], weight, **EXACT)
    torch.testing.assert_close(joint_cost(inverse, out, torch.tensor(gone)), missed, **EXACT)


@pytest.mark.parametrize(("n", "p"), [(9, 5), (9, 40), (150, 7)])
def test_each_step_takes_the_unit_whose_loss_the_others_mend_best(n: int, p: int) -> None:
    """150 units: more than two blocks of rank-64 products."""
    second, out = problem(n, p)
    found = eliminate(second, out, damping=1e-3)
    assert sorted(found.order) == list(range(n))
    gone: list[int] = []
    before = torch.zeros(()).double()
    steps = range(n - 1) if n < 10 else (0, 1, 63, 64, 65, 120, 140)
    for step in steps:
        gone = list(found.order[:step])
        before = least(second, out, sorted(set(range(n)) - set(gone)), 1e-3)[1] if gone else before
        after = {
            unit: least(second, out, sorted(set(range(n)) - {*gone, unit}), 1e-3)[1]
            for unit in set(range(n)) - set(gone)
        }
        best = min(after, key=lambda unit: float(after[unit]))
        assert found.order[step] == best
        torch.testing.assert_close(
            torch.tensor(found.costs[step]).double(), after[best] - before, rtol=1e-6, atol=0
        )  # a difference of two sums


def test_groups_by_brute_force_at_every_step() -> None:
    second, out = problem(12, 7)
    groups = list(torch.arange(12).split(3))
    found = eliminate(second, out, groups)
    gone: set[int] = set()
    for group in found.order[:-1]:
        costs = {
            g: float(
                least(second, out, [i for i in range(12) if i // 3 not in gone | {g}], 1e-3)[1]
            )
            for g in set(range(4)) - gone
        }
        assert group == min(costs, key=costs.__getitem__)
        gone.add(group)
    assert found.kept(2) == sorted(found.order[2:])


def test_the_order_beats_no_pair_by_chance() -> None:
    """Greedy isn't optimal, but on independent units it is: the pair of least energy goes first."""
    generator = torch.Generator().manual_seed(0)
    variance = torch.rand(7, generator=generator).double() + 0.1
    out = torch.randn(5, 7, generator=generator).double()
    found = eliminate(torch.diag(variance), out, damping=1e-9)
    energy = variance * out.square().sum(0)
    best = min(combinations(range(7), 2), key=lambda pair: float(energy[list(pair)].sum()))
    assert set(found.order[:2]) == set(best)
    torch.testing.assert_close(found.scores, energy, rtol=1e-6, atol=0)  # the ridge


def test_twins_cost_nothing_but_the_ridge_until_one_is_gone() -> None:
    second, out = problem(6, 5)
    index = torch.tensor([0, 1, 2, 3, 4, 5, 2, 4])
    found = eliminate(second[index][:, index], out[:, index], damping=1e-9)
    first = {int(index[u]) for u in found.order[:2]}
    assert first == {2, 4}
    assert found.costs[1] < 1e-6 * found.costs[2]


def test_dead_and_dependent_units_are_no_trouble() -> None:
    second, out = problem(11, 5, rank=4)
    second[3], second[:, 3] = 0, 0
    found = eliminate(second, out)
    assert 3 in found.order[:7]  # rank 4: seven units are as good as dead
    assert all(cost >= 0 for cost in found.costs)
    assert torch.isfinite(found.scores).all()
    nothing = eliminate(torch.zeros(5, 5).double(), out[:, :5])
    assert sorted(nothing.order) == list(range(5))


def test_scores_rank_as_the_order_does() -> None:
    second, out = problem(10, 6)
    found = eliminate(second, out)
    ranked = found.scores.argsort(stable=True)
    steps = found.scores[ranked]
    assert bool((steps.diff() >= 0).all())
    assert set(found.scores.topk(4).indices.tolist()) == set(found.kept(4))


def test_the_scorer_is_the_elimination_of_what_layers_read() -> None:
    subject = asked_vit(9)
    found = score("ziplm", subject)
    for seen in second_moments(subject):
        total = (seen.out @ seen.second * seen.out).sum()
        for name, groups in seen.groups():
            torch.testing.assert_close(
                found[name] * total, eliminate(seen.second, seen.out, groups).scores, **EXACT
            )


def test_scores_without_ties_choose_what_the_order_keeps() -> None:
    """Twins that cancel go for nothing, one dear unit after another: the running maximum ties."""
    second, out = problem(12, 3, seed=4, rank=5)
    second[:6, 6:] = 0.9 * second[:6, :6]
    second[6:, :6] = second[:6, 6:].T
    second[6:, 6:] = second[:6, :6]
    out[:, 6:] = -out[:, :6]
    found = eliminate(second, out)
    assert (torch.tensor(found.costs).diff() < 0).any()  # else there would be no tie
    for count in range(1, 12):
        assert sorted(found.scores.topk(count).indices.tolist()) == found.kept(count)
