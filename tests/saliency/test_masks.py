"""Masks through training, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saliency.small_nets import loss, mlp, pairs

from slimfuse.errors import StorageError, UserError
from slimfuse.saliency.masks import Masks, pack, unpack


def random_masks(seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (5, 7), "2.weight": (3, 5)}
    return Masks({n: torch.rand(s, generator=generator) < 0.4 for n, s in shapes.items()})


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    bits = pack(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-len(values) // 8)
    assert torch.equal(unpack(bits, mask.shape), mask)


@pytest.mark.parametrize("gradients", [False, True])
def test_pruned_weights_stay_zero_in_training(gradients: bool) -> None:
    model, masks, data = mlp(7, 5, 3), random_masks(), pairs(9, 7, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss(model, data).backward()
    optimizer.step()  # momentum that still pulls at what is pruned next
    free = copy.deepcopy(model)
    masks.apply(model)
    hold = masks.holding(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, data).backward()
        if gradients:
            masks.apply_gradients(model)
            weight = model[0].weight
            assert weight.grad is not None and not weight.grad[~masks["0.weight"]].any()
        optimizer.step()
        hold()
        masks.check(model)
    kept = masks["0.weight"]
    assert not torch.equal(model[0].weight[kept], free[0].weight[kept])  # the others learn
    assert Masks.of_zeros(model, masks)["2.weight"].equal(masks["2.weight"])
    with pytest.raises(UserError, match=r"0\.weight: 18"):
        masks.check(free)


def test_masks_survive_saving(tmp_path: Path) -> None:
    model, masks = mlp(7, 5, 3), random_masks()
    masks.apply(model)
    masks.save(tmp_path / "masks.safetensors", sparsity=0.6)
    masks.save(tmp_path / "again.safetensors", sparsity=0.6)
    one, two = (tmp_path / f"{n}.safetensors" for n in ("masks", "again"))
    assert one.read_bytes() == two.read_bytes()
    found = Masks.load(one)
    assert list(found) == list(masks) and all(found[n].equal(masks[n]) for n in masks)
    found.check(model)
    assert found.sparsity == pytest.approx(
        sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    )
    assert found.sparsities()["2.weight"] == 1 - int(masks["2.weight"].sum()) / 15


def test_what_is_not_a_mask_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.ones(2)}, file)
    with pytest.raises(StorageError, match="masks can't be read"):
        Masks.load(file)
    file.write_bytes(b"\x00" * 9)
    with pytest.raises(StorageError, match="masks can't be read"):
        Masks.load(file)
    with pytest.raises(UserError, match="of another model") as error:
        random_masks().apply(mlp(7, 5, 4))
    assert "2.weight (3, 5)" in str(error.value) and "0.weight" not in str(error.value)
