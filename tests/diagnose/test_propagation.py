"""Token cosines of uniform attention, gradients where all tokens are equal, slopes of nets."""

from __future__ import annotations

import pytest
import torch
from tiny import images, random_vit
from torch import Tensor, nn

from slimfuse.diagnose.lipschitz import (
    amplifications,
    convolution_norm,
    product_bound,
    slopes_of,
)
from slimfuse.diagnose.propagation import signals, stable_rank, token_cosine, uniform_cosine
from slimfuse.families import ViT


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "want"), [(1.0, 0.94), (8**-0.5, 0.09)])
def test_uniform_attention_makes_tokens_alike(alpha: float, want: float) -> None:
    depth, tokens, width = 8, 16, 1024
    assert uniform_cosine(depth, alpha, 1.0, tokens) == pytest.approx(want, abs=0.005)
    x = torch.linalg.qr(normal(width, tokens, seed=1)).Q.T * width**0.5
    for layer in range(depth):
        x = x + alpha * x.mean(0) @ normal(width, width, seed=2 + layer) / width**0.5
    found = float(token_cosine(x[None])[0])
    # wide enough for sums over units to be near their means
    assert found == pytest.approx(uniform_cosine(depth, alpha, 1.0, tokens), abs=0.03)


def test_cosine_and_rank_of_known_tokens() -> None:
    same, apart = torch.ones(1, 5, 7), torch.eye(5)[None]
    assert float(token_cosine(same)[0]) == pytest.approx(1) == float(stable_rank(same)[0])
    assert float(token_cosine(apart)[0]) == pytest.approx(0, abs=1e-12)
    assert float(stable_rank(apart)[0]) == pytest.approx(5)


def test_equal_tokens_have_no_gradients_of_queries_and_keys() -> None:
    model = random_vit()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "position" in name or "cls_token" in name:
                p.zero_()
        patch = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        cls = next(p for n, p in model.named_parameters() if "cls_token" in n)
        patch.weight.zero_()
        cls.copy_(patch.bias[None, None])
    layout = ViT().layout(model.config)
    found, count = signals(model, layout, [(images(3), None)], "classes")
    assert count == 3
    for one in found:
        assert one.cosine == pytest.approx(1) and one.stable_rank == pytest.approx(1)
        assert one.score_share < 1e-12  # a softmax's derivative times a constant


def test_signals_of_a_vit_are_those_of_its_parts() -> None:
    model, x = random_vit(), images(4)
    layout = ViT().layout(model.config)
    found, _ = signals(model, layout, [(x, None)], "classes")
    assert len(found) == 2
    states = model(pixel_values=x, output_hidden_states=True).hidden_states
    assert found[0].cosine == pytest.approx(float(token_cosine(states[1].detach()).mean()))
    parts: list[Tensor] = []
    handle = model.get_submodule(layout.blocks[1].o).register_forward_hook(
        lambda _m, _g, out: parts.append(out)
    )
    model(pixel_values=x)
    handle.remove()
    want = float(parts[0].detach().norm() / states[1].detach().norm())
    assert found[1].attention == pytest.approx(want)
    assert all(one.score_share > 1e-3 for one in found)


# -- slopes --------------------------------------------------------------------------------


def test_a_linear_net_has_one_slope() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    joint = (model[1].weight @ model[0].weight).detach()
    want = float(torch.linalg.matrix_norm(joint, ord=2))
    found = slopes_of(model, normal(3, 6, seed=1), iterations=60)
    assert found.tolist() == pytest.approx([want] * 3, rel=1e-3)  # from below
    assert float(found.max()) <= want * (1 + 1e-12)
    alone = nn.Sequential(nn.Linear(6, 5)).double()
    assert product_bound(alone) == pytest.approx(
        float(slopes_of(alone, normal(1, 6, seed=2), iterations=60)[0]), rel=1e-9
    )


def test_the_sandwich() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
    model = model.double()
    x = normal(40, 6, seed=3)
    lower = slopes_of(model, x, iterations=60)
    dense = torch.func.vmap(torch.func.jacrev(model))(x)
    true = torch.linalg.matrix_norm(dense, ord=2).detach()
    torch.testing.assert_close(lower, true, rtol=1e-3, atol=0)  # power iteration, from below
    assert bool((lower <= true * (1 + 1e-12)).all())
    pairs = normal(40, 6, seed=4)
    across = (model(x) - model(pairs)).detach().norm(dim=1) / (x - pairs).norm(dim=1)
    assert float(across.max()) <= product_bound(model) and float(true.max()) <= product_bound(model)


def test_convolution_norms_by_fourier() -> None:
    weight = normal(3, 2, 3, 3, seed=5)
    dense = torch.func.jacrev(
        lambda x: nn.functional.conv2d(
            nn.functional.pad(x[None], (1, 1, 1, 1), mode="circular"), weight
        )
    )(normal(2, 5, 6, seed=6)).reshape(3 * 30, 2 * 30)
    want = float(torch.linalg.matrix_norm(dense, ord=2))
    assert convolution_norm(weight, (5, 6)) == pytest.approx(want, rel=1e-12)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten()).double()
    lower = slopes_of(net, normal(4, 2, 5, 6, seed=7), iterations=30)
    assert float(lower.max()) <= product_bound(net, (5, 6))
    with pytest.raises(AssertionError, match="no bound here"):
        product_bound(nn.Sequential(nn.Softmax(1)))


def test_amplifications_are_those_of_noise() -> None:
    """½ κ² e nats for noise of relative energy e, by adding it."""
    model, x = random_vit(), images(16)
    blocks = [b.path for b in ViT().layout(model.config).blocks]
    found, count = amplifications(model, [(x, None)] * 25, blocks, "classes")
    assert count == 16 * 25
    before = model(pixel_values=x).logits.detach().log_softmax(1)
    home, size = model.get_submodule(blocks[1]), 1e-3
    costs = []
    for seed in range(25):

        def noisy(_module: nn.Module, given: tuple[Tensor, ...], seed: int = seed) -> object:
            z = given[0]
            # of the mean energy of all samples
            scale = (z.square().mean()) ** 0.5
            return (z + size * scale * normal(*z.shape, seed=seed), *given[1:])

        handle = home.register_forward_pre_hook(noisy)
        after = model(pixel_values=x).logits.detach().log_softmax(1)
        handle.remove()
        costs.append(float((before.exp() * (before - after)).sum(1).mean()))
    want = sum(costs) / len(costs)
    assert found[1] ** 2 * size**2 / 2 == pytest.approx(want, rel=0.3)  # 25 draws of each
