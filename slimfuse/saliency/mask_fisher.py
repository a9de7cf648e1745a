"""Mask Fisher: every sample's gradient of one mask a unit, in one ordinary backward pass.

A mask (samples, units) of ones multiplies the units; the sum of the samples' losses then has
∂L_n/∂m_j in row n, and I_j = E_n (∂L_n/∂m_j)². As ∂L/∂m_j = w_jᵀ ∂L/∂w_j for the weights w_j that
the mask scales, I_j is w_jᵀ E[g gᵀ] w_j: group OBS with block = group, undamped (times ½).
Sources: Kwon et al. 2022 (arXiv 2204.09656), eq. 7-9; Michel et al. 2019 (arXiv 1905.10650), eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slimfuse.batch import call
from slimfuse.errors import UserError
from slimfuse.saliency.units import Hooked, Scores, Site, Subject, gathered, scorer, sites


def mask_gradients(subject: Subject) -> Iterator[Scores]:
    """Yield ∂L_n/∂mask (samples, units) by name, float64, for one part of the batches after other.

    Names as in `Scores`; a space's is the sum over its axis, because one mask there multiplies
    all of it. Samples mustn't mix in the model (evaluation mode).
    """
    assert subject.loss is not None
    where = sites(subject.atlas, subject.layout)
    if subject.model.training:
        raise UserError("saliency is of a model in evaluation mode", hint="call model.eval()")
    dtype = next(subject.model.parameters()).dtype
    for inputs, labels in subject.passes():
        masks: dict[str, Tensor] = {}

        def touch(site: Site, _path: str, x: Tensor, masks: dict[str, Tensor] = masks) -> Tensor:
            if site.name not in masks:
                fresh = torch.ones(len(x), site.units, dtype=dtype, device=x.device)
                masks[site.name] = fresh.requires_grad_()
            mask = masks[site.name]
            return x * mask.view(len(mask), *[1] * (x.ndim - 2), site.units)

        with torch.enable_grad(), Hooked(subject.model, where, touch) as model:
            losses = subject.loss(call(model, inputs), inputs, labels)
            found = torch.autograd.grad(losses.sum(), list(masks.values()), allow_unused=True)
        gradients = dict(zip(masks, found, strict=True))
        yield gathered(
            pair
            for site in where
            for pair in site.split(_whole(gradients.get(site.name), len(losses), site))
        )


def _whole(found: Tensor | None, samples: int, site: Site) -> Tensor:
    """Return a mask's gradient, noughts where nothing hangs on it."""
    if found is None:
        return torch.zeros(samples, site.units, dtype=torch.float64)
    return found.double().cpu()


def _mean(subject: Subject, of: Callable[[Tensor], Tensor]) -> Scores:
    """Return the mean over all samples of a function of their gradients."""
    totals = gathered(
        (name, nought[0])
        for site in sites(subject.atlas, subject.layout)
        for name, nought in site.split(_whole(None, 1, site))
    )
    count = 0
    for part in mask_gradients(subject):
        for name, values in part.items():
            totals[name] += of(values).sum(0)
        count += len(next(iter(part.values())))
    means = _over_all(subject, torch.cat(list(totals.values())), count)
    return dict(zip(totals, means.split([len(v) for v in totals.values()]), strict=True))


def _over_all(subject: Subject, totals: Tensor, count: int) -> Tensor:
    """Return sums over samples divided by their number, over all processes if there are several."""
    if subject.reduce is not None:
        told = subject.reduce(torch.cat([totals.flatten(), totals.new_tensor([count])]))
        totals, count = told[:-1].view_as(totals), round(float(told[-1]))
    if not count:
        raise UserError("there is no sample to take gradients of", where="saliency")
    return totals / count


FISHER = "Kwon et al. 2022, arXiv 2204.09656, eq. 7-9"
TAYLOR = "Michel et al. 2019, arXiv 1905.10650, eq. 2"


@scorer("mask-fisher", reads="gradients", source=FISHER, sums=True)
def mask_fisher(subject: Subject) -> Scores:
    """Return E_n (∂L_n/∂mask)²."""
    return _mean(subject, torch.square)


@scorer("taylor", reads="gradients", source=TAYLOR, sums=True)
def taylor(subject: Subject) -> Scores:
    """Return E_n |∂L_n/∂mask|, the first-order change of every sample's loss."""
    return _mean(subject, torch.abs)


def branches(subject: Subject) -> tuple[Tensor, Tensor]:
    """Return E_n (∂L_n/∂mask)² of one mask on all heads, and one on the MLP, of each block.

    Two vectors (blocks,): what a shape planner asks when it takes whole blocks away. A branch's
    bias isn't masked.
    """
    axes = [
        [" ".join(leg.space for leg in subject.atlas.axes[f"{part}.weight"][1]) for part in pair]
        for pair in ((b.o, b.down) for b in subject.layout.blocks)
    ]
    total, count = torch.zeros(len(axes), 2, dtype=torch.float64), 0
    for part in mask_gradients(subject):
        whole = torch.stack([torch.stack([part[a].sum(1) for a in pair]) for pair in axes])
        total += whole.square().sum(2)
        count += whole.shape[2]
    attention, mlp = _over_all(subject, total, count).unbind(1)
    return attention, mlp
