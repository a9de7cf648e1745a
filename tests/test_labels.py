"""Goals for the head: the mean of equal parents, and the union of parents of other classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from slimfuse.errors import ParentError
from slimfuse.fuse.labels import FLOOR, LabelUnion, MeanLogits

torch.set_num_threads(1)
HALVES = (torch.tensor([0, 2, 4]), torch.tensor([3, 1]))
CHAIN = (torch.tensor([0, 1, 2]), torch.tensor([2, 3]), torch.tensor([4, 3, 5, 6]))
Parents = tuple[list[Tensor], list[Tensor], Tensor]


def answers(places: tuple[Tensor, ...], n: int, seed: int = 0, noise: float = 0.6) -> Parents:
    """Return logits (n, c_p), features (n, d_p) and labels (n,) of parents of Gaussian classes.

    An image of a parent's own class moves its features along that class's row of its head; one of
    a strange class moves them to that class's own place elsewhere, a little of it in the span.
    The logits' sizes differ between parents, so a plain union is badly calibrated.
    """
    random = np.random.default_rng(99)  # the parents: the same for every n and seed
    classes = 1 + max(int(p.max()) for p in places)
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=n)
    scores, features = [], []
    for p, own in enumerate(places):
        width, count = 11 + 2 * p, len(own)
        basis = np.linalg.qr(random.normal(size=(width, width)))[0]
        means = random.normal(size=(classes, width))  # in the basis; the head spans its first rows
        means[:, :count] *= 0.9
        means[own.numpy()] = 3 * np.eye(count, width)
        top = means[labels] + noise * draw.normal(size=(n, width))
        features.append(torch.from_numpy((top + 0.3 * p) @ basis))
        scores.append(torch.from_numpy((1.0 + p) * (top + 0.3 * p)[:, :count]))
    return scores, features, torch.from_numpy(labels)


def accuracy(goals: Tensor, labels: Tensor) -> float:
    return float((goals.argmax(1) == labels).double().mean())


def oracle(places: tuple[Tensor, ...], scores: list[Tensor], labels: Tensor) -> float:
    """Return the accuracy of parents that are asked only about images of their own classes."""
    right = torch.zeros(len(labels))
    for own, z in zip(places, scores, strict=True):
        right = torch.maximum(right, (own[z.argmax(1)] == labels).float())
    return float(right.mean())


def plain(places: tuple[Tensor, ...], scores: list[Tensor]) -> Tensor:
    out = torch.full((len(scores[0]), 1 + max(int(p.max()) for p in places)), -torch.inf).double()
    for own, z in zip(places, scores, strict=True):
        out[:, own] = torch.maximum(out[:, own], z)
    return out


def fitted(places: tuple[Tensor, ...], n: int = 600) -> LabelUnion:
    scores, features, _ = answers(places, n)
    return LabelUnion.fit(scores, places, features=features)


def test_mean_logits_weigh_the_parents_and_ask_for_no_features() -> None:
    a, b = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[4.0, 0.0, 1.0]])
    goals = MeanLogits([3, 1], 3)
    expected = 0.75 * a + 0.25 * b
    torch.testing.assert_close(goals([a, b]), expected, rtol=0, atol=0)  # exact binary shares
    torch.testing.assert_close(goals([a, b], [a, b]), expected, rtol=0, atol=0)
    assert [w for _, w in goals.shares] == [0.75, 0.25]


def test_equal_label_sets_are_the_mean_of_log_probabilities() -> None:
    draw = torch.Generator().manual_seed(3)
    scores = [torch.randn(13, 5, generator=draw, dtype=torch.float64) for _ in range(3)]
    order = torch.tensor([3, 1, 4, 0, 2])
    places = [torch.arange(5), order, torch.arange(5)]
    union = LabelUnion.fit([z[:2] for z in scores], places, [2, 1, 1])  # two images are enough
    second = torch.empty_like(scores[1])
    second[:, order] = torch.log_softmax(scores[1], 1)
    logs = [torch.log_softmax(scores[0], 1), second, torch.log_softmax(scores[2], 1)]
    mean = 0.5 * logs[0] + 0.25 * logs[1] + 0.25 * logs[2]
    # the same sums in another order, in float64
    torch.testing.assert_close(
        union(scores), mean - mean.mean(1, keepdim=True), rtol=1e-13, atol=1e-13
    )
    assert union.evidence is None and bool((union.knows(scores) == 1).all())
    assert [w for _, w in union.shares] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("places", [HALVES, CHAIN], ids=["disjoint", "overlapping"])
def test_the_known_gate_is_recovered_without_labels(places: tuple[Tensor, ...]) -> None:
    union = fitted(places)
    scores, features, labels = answers(places, 900, seed=1)
    known = union.knows(scores, features)
    for p, own in enumerate(places):
        right = ((known[:, p] > 0.5) == torch.isin(labels, own)).double().mean()
        # the two mixtures overlap in the tails only: the true parameters give above 0.99
        assert float(right) > 0.97
    found = accuracy(union(scores, features), labels)
    assert found > accuracy(plain(places, scores), labels) + 0.03
    assert found > oracle(places, scores, labels) - 0.03


def test_logits_alone_help_too() -> None:
    scores, _, _ = answers(CHAIN, 600)
    union = LabelUnion.fit(scores, CHAIN)
    scores, _, labels = answers(CHAIN, 900, seed=1)
    assert union.evidence == "energy"
    assert accuracy(union(scores), labels) > accuracy(plain(CHAIN, scores), labels) + 0.05


def test_a_parent_of_every_class_is_never_doubted() -> None:
    places = (torch.arange(5), torch.tensor([1, 3]))
    scores, features, labels = answers(places, 400)
    union = LabelUnion.fit(scores, places, features=features)
    known = union.knows(scores, features)
    torch.testing.assert_close(known[:, 0], torch.ones(400).double())  # a sum of a softmax
    assert ((known[:, 1] > 0.5) == torch.isin(labels, places[1])).double().mean() > 0.9


def test_goals_are_centred_finite_and_bounded() -> None:
    union = fitted(HALVES)
    scores, features, _ = answers(HALVES, 50, seed=2)
    far = [1e3 * f for f in features]  # nothing that was calibrated on
    for seen in (features, far):
        goals = union(scores, seen)
        assert goals.dtype == torch.float64 and bool(goals.isfinite().all())
        torch.testing.assert_close(goals.sum(1), torch.zeros(50).double(), rtol=0, atol=1e-12)
        widest = max(float((z.amax(1) - z.amin(1)).max()) for z in scores)
        # |log softmax| <= range + log c, the gate adds at most -log FLOOR
        reach = widest + np.log(max(z.shape[1] for z in scores)) - np.log(FLOOR)
        assert float((goals.amax(1) - goals.amin(1)).max()) <= reach


def test_soft_targets_are_the_goals_at_a_temperature() -> None:
    union = fitted(CHAIN)
    scores, features, _ = answers(CHAIN, 31, seed=2)
    goals = union(scores, features).numpy()
    for temperature in (1.0, 4.0):
        power = np.exp(goals / temperature)
        soft = union.probabilities(scores, features, temperature=temperature)
        np.testing.assert_allclose(soft, power / power.sum(1, keepdims=True), rtol=1e-12)


def test_inside_its_classes_a_parent_keeps_its_own_opinion() -> None:
    union = fitted(HALVES)
    scores, features, _ = answers(HALVES, 31, seed=2)
    goals = union(scores, features)
    for own, z in zip(HALVES, scores, strict=True):
        ours, theirs = goals[:, own], z - z.mean(1, keepdim=True)
        torch.testing.assert_close(ours - ours.mean(1, keepdim=True), theirs)  # the gate is a shift


def test_the_order_of_the_parents_does_not_matter() -> None:
    scores, features, _ = answers(CHAIN, 600)
    weights, order = [1.0, 3.0, 2.0], [2, 0, 1]
    union = LabelUnion.fit(scores, CHAIN, weights, features=features)
    turned = LabelUnion.fit(
        [scores[i] for i in order], [CHAIN[i] for i in order], [weights[i] for i in order],
        features=[features[i] for i in order],
    )  # fmt: skip
    expected = union(scores, features)
    found = turned([scores[i] for i in order], [features[i] for i in order])
    # other rounding of the same sums and of the logistic's Newton steps (tol 1e-8)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert turned.evidence == union.evidence


def test_the_same_images_give_the_same_union_and_batches_do_not_matter() -> None:
    scores, features, _ = answers(HALVES, 300)
    first, second = (LabelUnion.fit(scores, HALVES, features=features) for _ in range(2))
    expected = first(scores, features)
    torch.testing.assert_close(second(scores, features), expected, rtol=0, atol=0)
    parts = [
        first([z[rows] for z in scores], [f[rows] for f in features])
        for rows in torch.arange(300).split(7)
    ]
    torch.testing.assert_close(torch.cat(parts), expected)  # other blocks of the same products


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("evidence", ["energy", "span", "norm"])
def test_every_evidence_can_be_asked_for(evidence: str, rounds: int) -> None:
    scores, features, labels = answers(CHAIN, 400)
    union = LabelUnion.fit(scores, CHAIN, features=features, evidence=evidence, rounds=rounds)  # type: ignore[arg-type]
    assert union.evidence == evidence
    assert bool(union(scores, features).isfinite().all())
    if evidence != "norm":  # strange images move these features as far as known ones
        assert accuracy(union(scores, features), labels) > 0.8


def test_the_first_evidence_is_the_one_that_tells() -> None:
    """Spoil one evidence at a time: the choice goes elsewhere, without labels."""
    scores, features, _ = answers(HALVES, 600)
    draw = torch.Generator().manual_seed(0)
    sizes = [2 * torch.randn(600, 1, generator=draw).double() for _ in scores]
    shifted = [z + s * 10 for z, s in zip(scores, sizes, strict=True)]  # energies tell nothing now
    assert LabelUnion.fit(shifted, HALVES, features=features).evidence != "energy"
    scaled = [f * s.exp() for f, s in zip(features, sizes, strict=True)]  # and norms nothing here
    assert LabelUnion.fit(scores, HALVES, features=scaled).evidence != "norm"


def test_classes_that_several_parents_know_are_shared_by_weight() -> None:
    scores, features, _ = answers(CHAIN, 400)
    union = LabelUnion.fit(scores, CHAIN, [1, 3, 1], features=features)
    shares = union.shares
    assert [p.tolist() for p, _ in shares] == [p.tolist() for p in CHAIN]
    assert torch.as_tensor(shares[0][1]).flatten().tolist() == [1, 1, 0.25]
    assert shares[1][1] == 0.75  # one number where they agree
    assert torch.as_tensor(shares[2][1]).flatten().tolist() == [1, 0.25, 1, 1]
    # what the prior of the head makes of them: every class's shares sum to one
    total = torch.zeros(7, 4, dtype=torch.float64)
    for places, share in shares:
        total[places] += share * torch.ones(len(places), 4, dtype=torch.float64)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert [w for _, w in fitted(HALVES).shares] == [1.0, 1.0]


def test_misuse_is_told() -> None:
    scores, features, _ = answers(HALVES, 40)
    with pytest.raises(ParentError, match=r"classes without a parent: \[5\]") as told:
        LabelUnion.fit(scores, HALVES, classes=6, features=features)
    assert told.value.hint
    with pytest.raises(ParentError, match="too few") as told:
        LabelUnion.fit([z[:25] for z in scores], HALVES, features=[f[:25] for f in features])
    assert told.value.got == 25 and "at least 26" in str(told.value)  # the wider parent has 13
    broken = [scores[0], scores[1].clone()]
    broken[1][3, 0] = torch.nan
    with pytest.raises(ParentError, match="not finite") as told:
        LabelUnion.fit(broken, HALVES, features=features)
    assert "parent 1" in str(told.value)


def test_own_invariants_are_asserted() -> None:
    scores, features, _ = answers(HALVES, 40)
    with pytest.raises(AssertionError, match="distinct"):
        LabelUnion.fit(scores, [torch.tensor([0, 0, 2]), HALVES[1]], features=features)
    with pytest.raises(AssertionError, match="positive"):
        LabelUnion.fit(scores, HALVES, [1, 0], features=features)
    with pytest.raises(AssertionError, match="different images"):
        LabelUnion.fit([scores[0][:30], scores[1]], HALVES, features=features)
    union = LabelUnion.fit(scores, HALVES, features=features)
    with pytest.raises(AssertionError, match="other inputs"):
        union(scores)
    with pytest.raises(AssertionError, match="a logit for every class"):
        union(scores[::-1], features)
