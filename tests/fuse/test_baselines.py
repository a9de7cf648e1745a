"""The controls: what weight subcloning and pruning keep, and how they scale it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import images, logits, random_vit, vit_config

from slimfuse.families import ViT
from slimfuse.fuse.baselines import kept_blocks, select, subclone


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


# ---- depth


def test_kept_blocks_are_evenly_spaced() -> None:
    assert kept_blocks(6, 3) == [1, 3, 5]
    assert kept_blocks(5, 5) == [0, 1, 2, 3, 4]
    assert kept_blocks(7, 2) == [1, 5]
    assert kept_blocks(4, 1) == [2]
    for count in range(1, 13):
        for keep in range(1, count + 1):
            kept = kept_blocks(count, keep)
            assert kept == sorted(set(kept)) and len(kept) == keep and kept[-1] < count


@pytest.mark.parametrize("method", [subclone, select])
def test_a_shallower_target_gets_whole_blocks(method: Any) -> None:
    parent = random_vit(num_hidden_layers=5)
    target = ViT().build(vit_config(num_hidden_layers=2)).double()
    batches = () if method is subclone else (lambda: [images(5)],)
    method(parent, target, ViT(), *batches)
    for new, old in zip(target.vit.layers, (parent.vit.layers[i] for i in (1, 3)), strict=True):
        for (name, a), b in zip(new.named_parameters(), old.parameters(), strict=True):
            assert torch.equal(a, b), name  # copied, and every width is kept
    assert torch.equal(target.classifier.weight, parent.classifier.weight)


# ---- pruning


def pruned(parent: Any, batches: Any, **sizes: Any) -> Any:
    family = ViT()
    target = family.build(vit_config(**sizes)).double()
    select(parent, target, family, batches)
    return target


def test_units_that_write_nothing_go_first_and_the_function_stays() -> None:
    parent = random_vit()
    silent = [0, 4, 7, 16]
    with torch.no_grad():
        for layer in parent.vit.layers:
            layer.mlp.fc2.weight[:, silent] = 0
            layer.mlp.fc1.weight[silent] *= 100  # large weights don't help
    target = pruned(parent, lambda: [images(5), images(3, seed=2)], intermediate_size=13)
    pixels = images(6, seed=3)
    # float64: the same sums with the noughts left out
    torch.testing.assert_close(logits(target, pixels), logits(parent, pixels), rtol=1e-10, atol=0)


def test_a_head_that_writes_nothing_goes_first() -> None:
    parent = random_vit()
    with torch.no_grad():
        for layer in parent.vit.layers:
            layer.attention.o_proj.weight[:, 5:10] = 0  # the middle head of three
    target = pruned(parent, lambda: [images(5)], num_attention_heads=2, head_dim=5)
    pixels = images(6, seed=3)
    torch.testing.assert_close(logits(target, pixels), logits(parent, pixels), rtol=1e-10, atol=0)


def test_the_streams_channels_that_vary_most_stay() -> None:
    parent = random_vit()
    seen = []
    hooks = [
        parent.get_submodule(name).register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
        for name in ("vit.layers.1.layernorm_before", "vit.layernorm")  # after each block
    ]
    pixels = images(7)
    logits(parent, pixels)
    for hook in hooks:
        hook.remove()
    unit = []
    for x in seen:
        centred = x.reshape(-1, 15) - x.reshape(-1, 15).mean(1, keepdim=True)
        unit.append(centred / centred.norm(dim=1, keepdim=True))
    spread = torch.cat(unit).var(0, correction=0)
    target = pruned(parent, lambda: [pixels], hidden_size=9)
    kept = spread.topk(9).indices.sort().values
    assert torch.equal(target.vit.layernorm.weight, parent.vit.layernorm.weight[kept])
    assert torch.equal(target.classifier.weight, parent.classifier.weight[:, kept])
