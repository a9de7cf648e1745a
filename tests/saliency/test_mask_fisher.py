"""Mask Fisher: per-sample gradients by an independent way, and what follows from them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from saliency.asked import asked_vit, every_subject
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimfuse.errors import UserError
from slimfuse.saliency import Subject, score
from slimfuse.saliency.diagonal import sample_gradients, scaled
from slimfuse.saliency.losses import against_labels, own_answers
from slimfuse.saliency.magnitude import powers
from slimfuse.saliency.mask_fisher import branches, mask_gradients
from slimfuse.saliency.units import gathered, sites
from slimfuse.spaces import Atlas

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64, the same sums in another order
NAMES = tuple(every_subject())
subjects = cache(every_subject)


def by_weights(subject: Subject) -> dict[str, Tensor]:
    """Return ∂L_n/∂mask (samples, units) as wᵀ ∂L_n/∂w over what a mask scales, by a plain loop."""
    state = {n: p.detach() for n, p in subject.model.named_parameters()}
    masked = scaled(subject.atlas, subject.layout)
    names = list(dict.fromkeys(n for _, parameters, _ in masked for n in parameters))
    rows = []
    for one in sample_gradients(subject, names):
        products = {n: state[n] * g for n, g in one.items()}
        row = []
        for site, parameters, role in masked:
            part = Atlas({n: subject.atlas.axes[n] for n in parameters}, subject.atlas.spaces)
            both = [
                powers({n: f(p) for n, p in products.items()}, part, site.spaces, role, 1)
                for f in (lambda p: p.clamp_min(0), lambda p: p.clamp_max(0))
            ]  # `powers` takes magnitudes
            row += list(site.split((both[0] - both[1])[None]))
        rows.append(gathered(row))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("name", NAMES)
def test_one_backward_gives_every_samples_own_gradient(name: str) -> None:
    subject = replace(subjects()[name], loss=fixed_loss(subjects()[name]))
    parts = list(mask_gradients(subject))
    found = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    truth = by_weights(subject)
    assert found.keys() == truth.keys()
    tied = subject.layout.tied and subject.layout.norm_order == "pre"
    for space, values in found.items():
        if tied and space == subject.layout.stream_space:
            continue  # the table is a reader, too: its wᵀg says more than the mask's
        torch.testing.assert_close(values, truth[space], **EXACT, msg=space)
        assert float(values.abs().max()) > 0, space


def fixed_loss(subject: Subject):  # type: ignore[no-untyped-def]
    """Return a loss without draws, so that both ways see the same: a fixed form of the answers."""

    def loss(output, _inputs, _labels):  # type: ignore[no-untyped-def]
        z = output.logits if "logits" in output else output.last_hidden_state
        flat = z.flatten(1)
        weights = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
        return (flat.sin() * weights).sum(1)

    return loss


def test_scores_are_those_of_vmap() -> None:
    """Masks of one layer by torch.func instead of hooks: the MLP's second linear layer."""
    subject = asked_vit(7, loss=against_labels)
    model, block = subject.model, subject.layout.blocks[1]
    pixels = torch.cat(list(subject.examples()))
    labels = torch.arange(7)
    subject = replace(
        subject, examples=lambda: [(pixels[:4], labels[:4]), (pixels[4:], labels[4:])]
    )
    weight = model.get_parameter(f"{block.down}.weight").detach()

    def loss(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parameters = {f"{block.down}.weight": weight * mask}
        z = functional_call(model, parameters, (x[None],)).logits
        return torch.nn.functional.cross_entropy(z, y[None])

    with sdpa_kernel(SDPBackend.MATH):
        each = vmap(grad(loss), in_dims=(None, 0, 0))(torch.ones(17).double(), pixels, labels)
    torch.testing.assert_close(
        score("mask-fisher", subject)[block.mlp_space], each.square().mean(0), rtol=1e-6, atol=0
    )  # 1e-6: the bound of saliency.md; measured 1e-15
    torch.testing.assert_close(
        score("taylor", subject)[block.mlp_space], each.abs().mean(0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("damping", [1e-3, 1e-1])
def test_it_is_group_obs_with_a_block_a_group(damping: float) -> None:
    """ρ_Q = ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q = ½ (I_Q + λ|w_Q|²), F of each unit's weights; λ → 0: I_Q."""
    subject = asked_vit(60, loss=fixed_loss(asked_vit()))
    block = subject.layout.blocks[0]
    name = f"{block.down}.weight"
    each = torch.stack([g[name] for g in sample_gradients(subject, [name])])  # (60, 15, 17)
    weight = subject.model.get_parameter(name).detach()
    fisher = torch.einsum("npj,nqj->jpq", each, each) / len(each)
    scale = damping * fisher.diagonal(dim1=1, dim2=2).mean()
    inverse = torch.linalg.inv(fisher + scale * torch.eye(15).double())
    obs = torch.stack(
        [w @ torch.linalg.inv(i) @ w / 2 for w, i in zip(weight.T, inverse, strict=True)]
    )
    got = score("mask-fisher", subject)[block.mlp_space] + scale * weight.square().sum(0)
    torch.testing.assert_close(got / 2, obs, rtol=1e-9, atol=0)  # two inverses, condition 1e5


def test_order_and_copies_of_samples_change_nothing() -> None:
    subject = asked_vit(11, loss=fixed_loss(asked_vit()))
    pixels = torch.cat(list(subject.examples()))
    shuffled = pixels[torch.randperm(11, generator=torch.Generator().manual_seed(3))]
    first = score("mask-fisher", subject)
    for other in ([shuffled], [pixels, shuffled]):
        again = score("mask-fisher", replace(subject, examples=lambda other=other: other))
        for name, values in first.items():
            torch.testing.assert_close(again[name], values, **EXACT)


def test_a_unit_that_is_never_read_has_no_saliency() -> None:
    subject = asked_vit()
    block = subject.layout.blocks[0]
    with torch.no_grad():
        subject.model.get_parameter(f"{block.down}.weight")[:, 3] = 0
        subject.model.get_parameter(f"{block.o}.weight")[:, 5:10] = 0  # the second head of three
    for name in ("mask-fisher", "taylor", "diagonal-fisher", "energy", "magnitude", "l1", "ziplm"):
        found = score(name, subject)
        # ziplm: a unit that is never read stands for none, but what it costs is the ridge's
        assert float(found[block.mlp_space][3]) <= 1e-12 * float(found[block.mlp_space].max()), name
        heads = found[block.head_space]
        assert float(heads[1]) <= 1e-12 * float(heads.max()), name


def test_the_models_own_answers_approach_the_expectation_over_all_labels() -> None:
    """E over y ~ p(y|x) of (∂L/∂m)² by weighing every label with its probability."""
    subject = asked_vit(3)
    pixels = torch.cat(list(subject.examples()))
    with torch.no_grad():
        p = subject.model(pixels).logits.softmax(1)
    truth = torch.zeros(17).double()
    for label in range(7):
        own = replace(
            subject,
            examples=lambda label=label: [(pixels, torch.full((3,), label))],
            loss=against_labels,
        )
        (part,) = mask_gradients(own)
        truth += (p[:, [label]] * part["mlp.0"].square()).mean(0)
    drawn = replace(subject, examples=lambda: [pixels] * 400, loss=own_answers(5))
    got = score("mask-fisher", drawn)["mlp.0"]
    # 1 200 draws of heavy-tailed squares: 3 % standard error in the sum, 0.2 is over 5 of them
    assert float((got.sum() / truth.sum() - 1).abs()) < 0.2
    torch.testing.assert_close(got, truth, rtol=0.5, atol=0.05 * float(truth.max()))


def test_a_whole_branch_is_the_sum_of_its_units_masks() -> None:
    subject = asked_vit(loss=fixed_loss(asked_vit()))
    heads, mlp = branches(subject)
    parts = list(mask_gradients(subject))
    for i in range(2):
        one = torch.cat([p[f"mlp.{i}"].sum(1) for p in parts]).square().mean()
        torch.testing.assert_close(mlp[i], one, **EXACT)
        one = torch.cat([p[f"head.{i}"].sum(1) for p in parts]).square().mean()
        torch.testing.assert_close(heads[i], one, **EXACT)


def test_the_model_is_left_as_it_was() -> None:
    subject = asked_vit()
    subject.model.requires_grad_(False)
    with torch.no_grad():
        before = subject.model(torch.cat(list(subject.examples()))).logits
        for name in ("mask-fisher", "diagonal-fisher", "ziplm"):
            score(name, subject)
        after = subject.model(torch.cat(list(subject.examples()))).logits
    assert torch.equal(before, after)
    assert not any(p.requires_grad for p in subject.model.parameters())
    assert all(p.grad is None for p in subject.model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in subject.model.modules())


def test_what_cannot_be_scored_is_said() -> None:
    subject = asked_vit()
    with pytest.raises(UserError, match="no such saliency"):
        score("fisher", subject)
    with pytest.raises(UserError, match="needs a loss"):
        score("taylor", replace(subject, loss=None))
    with pytest.raises(UserError, match="labels"):
        score("taylor", replace(subject, loss=against_labels))
    with pytest.raises(UserError, match="no sample"):
        score("taylor", replace(subject, examples=tuple))
    subject.model.train()
    with pytest.raises(UserError, match="evaluation mode"):
        score("mask-fisher", subject)


def test_every_axis_of_units_has_a_site() -> None:
    for name, subject in subjects().items():
        seen = {s for site in sites(subject.atlas, subject.layout) for s in site.reports}
        missing = set(subject.atlas.free) - seen
        assert missing <= {"embed"}, (name, missing)  # ELECTRA's embeddings keep their width
