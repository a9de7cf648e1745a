"""The controls: what weight subcloning copies, and how it scales it."""

from __future__ import annotations

from typing import Any

import torch
from tiny import images, logits, random_vit, vit_config

from slimfuse.families import ViT
from slimfuse.fuse.baselines import subclone


def cloned(parent: Any, **sizes: Any) -> Any:
    family = ViT()
    target = family.build(vit_config(**sizes)).double()
    before = {k: v.clone() for k, v in parent.state_dict().items()}
    subclone(parent, target, family)
    for name, value in parent.state_dict().items():
        assert torch.equal(value, before[name])  # the parent is only read
    return target


def test_at_equal_width_it_is_the_parent(vit: Any) -> None:
    target = cloned(vit)
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, vit.state_dict()[name], rtol=0, atol=0)  # copies


def test_a_narrower_target_keeps_its_own_shapes_and_runs() -> None:
    parent = random_vit()
    target = cloned(parent, hidden_size=8, num_attention_heads=2, intermediate_size=11)
    assert target.vit.layers[1].mlp.fc1.weight.shape == (11, 8)
    out = logits(target, images(3))
    assert out.shape == (3, 7) and bool(torch.isfinite(out).all())
    assert float(out.std()) > 0


def test_the_units_with_the_largest_written_norm_are_kept_in_order_and_readers_scaled() -> None:
    parent = random_vit()
    dropped = [0, 5, 6, 16]
    with torch.no_grad():
        for layer in parent.vit.layers:
            layer.mlp.fc1.weight[dropped] *= 1e-3
            layer.mlp.fc1.bias[dropped] *= 1e-3
    target = cloned(parent, intermediate_size=13)
    kept = [i for i in range(17) if i not in dropped]
    for old, new in zip(parent.vit.layers, target.vit.layers, strict=True):
        # copied, so exact; the scale √(n/m) is one float64 product
        assert torch.equal(new.mlp.fc1.weight, old.mlp.fc1.weight[kept])
        assert torch.equal(new.mlp.fc1.bias, old.mlp.fc1.bias[kept])
        torch.testing.assert_close(
            new.mlp.fc2.weight, old.mlp.fc2.weight[:, kept] * (17 / 13) ** 0.5, rtol=1e-14, atol=0
        )
        assert torch.equal(new.mlp.fc2.bias, old.mlp.fc2.bias)


def test_heads_go_as_a_whole_and_are_scored_by_all_that_they_write() -> None:
    parent = random_vit()
    with torch.no_grad():
        for layer in parent.vit.layers:
            for part in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.attention, part).weight[5:10] *= 1e-3  # the middle head of three
                getattr(layer.attention, part).bias[5:10] *= 1e-3
    config = parent.config
    family = ViT()
    narrow = vit_config(num_attention_heads=2, head_dim=5)
    target = family.build(narrow).double()
    subclone(parent, target, family)
    kept = [*range(5), *range(10, 15)]
    assert family.query_scale(config, narrow) == 1
    for old, new in zip(parent.vit.layers, target.vit.layers, strict=True):
        assert torch.equal(new.attention.v_proj.weight, old.attention.v_proj.weight[kept])
        torch.testing.assert_close(
            new.attention.o_proj.weight,
            old.attention.o_proj.weight[:, kept] * (3 / 2) ** 0.5,
            rtol=1e-14, atol=0,
        )  # fmt: skip
