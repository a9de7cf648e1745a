"""Token importance against the whole Jacobian, in float64."""

from __future__ import annotations

from typing import Any

import torch
from tiny import images, random_vit
from torch import Tensor

from slimfuse.families import ViT
from slimfuse.fuse import walk
from slimfuse.fuse.importance import FLOOR, drawn, gradients, token_weights

TOKENS = 10


def weights(*models: Any, batches: Any = None, shares: Any = None) -> Tensor:
    chosen = images(12).split(4) if batches is None else batches
    found = [gradients(m, ViT().layout(m.config), chosen, range(5)) for m in models]
    return token_weights(found, shares or [1.0] * len(models))


def test_every_depth_keeps_its_total_and_no_token_falls_below_the_floor(vit: Any) -> None:
    found = weights(vit)
    assert found.shape == (5, TOKENS)  # embedding, and after every attention and MLP
    torch.testing.assert_close(
        found.mean(1), torch.ones(5).double(), rtol=1e-12, atol=0
    )  # float64 sums of ten
    assert float(found.min()) >= FLOOR


def test_after_the_last_attention_only_the_readout_token_counts(vit: Any) -> None:
    found = weights(vit)
    want = torch.full((2, TOKENS), FLOOR, dtype=torch.float64)
    want[:, 0] += TOKENS * (1 - FLOOR)
    torch.testing.assert_close(found[3:], want, rtol=1e-12, atol=0)
    assert float(found[:3, 1:].max()) > 2 * FLOOR  # before it the others are read


def test_a_parent_counts_by_its_weight(vit: Any) -> None:
    other, x = random_vit(seed=5), images(4)
    heavy = weights(vit, other, batches=[x], shares=[1.0, 0.0])
    torch.testing.assert_close(heavy, weights(vit, batches=[x]), rtol=1e-12, atol=0)


def test_it_estimates_the_squared_jacobian(vit: Any) -> None:
    with torch.no_grad():  # what all classes share leaves the softmax as it was: not to be seen
        vit.classifier.weight += 10 * vit.classifier.weight[:1].clone()
    x, layout = images(1), ViT().layout(vit.config)
    found = weights(vit, batches=[x] * 300)
    begun = walk.start(vit, layout, x)

    def tail(stream: Tensor) -> Tensor:
        for block, told in zip(layout.blocks, begun.calls, strict=True):
            stream = stream + walk.apply(vit, block.o, walk.attend(vit, block, stream, told))
            stream = stream + walk.mlp(vit, block, stream)[1]
        out = walk.apply(vit, layout.head, walk.read_out(vit, layout, stream))[0]
        return out - out.mean()

    jacobian = torch.autograd.functional.jacobian(tail, begun.stream.detach())
    want = jacobian.square().sum(dim=(0, 1, 3))
    want = (1 - FLOOR) * want / want.mean() + FLOOR
    # 300 random signs: the relative spread of a mean of squares is about √(2/300) = 8 %
    torch.testing.assert_close(found[0], want, rtol=0.25, atol=0)


def test_parents_count_alike_and_keep_no_gradient(vit: Any) -> None:
    other = random_vit(seed=5)
    alone = [weights(m, batches=[images(4)]) for m in (vit, other)]
    assert not torch.equal(*alone)
    both = weights(vit, vit, batches=[images(4)])
    torch.testing.assert_close(both.mean(1), torch.ones(5).double(), rtol=1e-12, atol=0)
    with torch.no_grad():  # as a refit calls it
        weights(vit, other)
    assert all(p.grad is None for p in (*vit.parameters(), *other.parameters()))


def test_the_same_call_gives_the_same_weights(vit: Any) -> None:
    assert torch.equal(weights(vit), weights(vit))


def test_directions_are_the_gradients_second_moment(vit: Any) -> None:
    layout, x = ViT().layout(vit.config), images(3)
    found = gradients(vit, layout, [x], [4], directions=True)
    with torch.enable_grad():
        stream = list(walk.streams(vit, layout, x))[-1].detach().requires_grad_()
        logits = walk.apply(vit, layout.head, walk.read_out(vit, layout, stream))
        signs = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(0))
        centred = logits - logits.mean(1, keepdim=True)
        (grad,) = torch.autograd.grad((centred * (2 * signs - 1)).sum(), stream)
    want = torch.einsum("btd,bte->de", grad, grad)
    assert found.directions is not None
    torch.testing.assert_close(found.directions, want / want.trace(), rtol=1e-10, atol=1e-14)
    assert found.directions.shape == (15, 15)


def test_a_share_is_drawn_from_every_batch_and_the_same_each_time() -> None:
    batches = list(images(60).split(20))
    one, again = (torch.cat(list(drawn(batches, 0.4))) for _ in range(2))
    assert torch.equal(one, again) and 10 < len(one) < 40
    assert len(torch.cat(list(drawn(batches, 1.0)))) == 60
