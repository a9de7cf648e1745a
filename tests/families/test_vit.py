"""What only the ViT has: optional biases, a head size of its own, unreadable folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import images, random_vit, vit_config
from torch.utils.flop_counter import FlopCounterMode

from slimfuse.errors import ParentError
from slimfuse.families import ViT
from slimfuse.families.base import Shape


def test_biases_may_be_absent() -> None:
    model = ViT().build(vit_config(qkv_bias=False))
    atlas = ViT().atlas(model.config)
    atlas.check({n: tuple(p.shape) for n, p in model.named_parameters()})
    assert not any("q_proj.bias" in name for name in atlas.axes)


def test_a_head_size_of_its_own_counts_in_legs_and_flops() -> None:
    model = ViT().build(vit_config(head_dim=7), attention="eager")
    ViT().atlas(model.config).check({n: tuple(p.shape) for n, p in model.named_parameters()})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=images(1).float())
    assert ViT().flops(model.config) == counter.get_total_flops()  # exact, as in the contract


def test_a_narrowed_model_divides_its_width_by_its_heads() -> None:
    config = ViT().narrow(vit_config(head_dim=7), Shape(8, 2, 11, 2))
    assert ViT().head_dims(config) == 4
    assert ViT().build(config).vit.layers[0].attention.q_proj.weight.shape == (8, 8)


def test_a_missing_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match=r"config\.json"):
        ViT().load(tmp_path / "nowhere")


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import DeiTConfig

    DeiTConfig().save_pretrained(tmp_path)
    with pytest.raises(ParentError) as caught:
        ViT().load_config(str(tmp_path))
    assert caught.value.got == "deit" and caught.value.allowed == "vit"


def test_a_weight_file_cut_off_is_refused(tmp_path: Path) -> None:
    random_vit().float().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ParentError, match="can't be read"):
        ViT().load(tmp_path)


def test_missing_and_unexpected_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    random_vit().float().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["spare.weight"] = weights.pop("classifier.bias")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ParentError, match="don't fit its config") as caught:
        ViT().load(tmp_path)
    assert "classifier.bias" in str(caught.value.got)
    assert "spare.weight" in str(caught.value.got)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    random_vit().float().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["classifier.bias"] = torch.zeros(9)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ParentError):
        ViT().load(tmp_path)
