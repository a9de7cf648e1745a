"""BERT: what every family has to keep, and what it alone does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Bert, Shape
from slimfuse.fuse import walk
from slimfuse.spaces import AxisMap, LinearMap, NestedMap, transform

WIDE = Shape(15, 3, 17, 2)
NARROW = Shape(8, 2, 11, 2)
LABELS = ("a", "b", "c", "d", "e", "f", "g")
VOCABULARY, TOKENS = 13, 6


def config_of(shape: Shape = WIDE, **inputs: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "positions": TOKENS, "types": 2, **inputs}
    return Bert().new_config(shape, labels=LABELS, **sizes)


def model_of(shape: Shape = WIDE, seed: int = 0) -> Any:
    """Random values everywhere, norms and biases too."""
    model = Bert().build(config_of(shape)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(1 + 0.2 * noise if name.endswith("LayerNorm.weight") else noise / 4)
    return model


def ids(n: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, VOCABULARY, (n, tokens), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=x).logits
    return out


def test_every_parameter_has_legs_and_sizes_agree() -> None:
    model = model_of()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    atlas = Bert().atlas(model.config)
    atlas.check(shapes)
    assert atlas.axes.keys() == shapes.keys() == model.state_dict().keys()
    assert all(atlas.shape(name) == shape for name, shape in shapes.items())


def test_sizes_of_spaces_are_told_apart_by_the_shapes() -> None:
    sizes = {name: s.size for name, s in Bert().atlas(config_of()).spaces.items()}
    assert (sizes["vocab"], sizes["positions"], sizes["types"]) == (13, 6, 2)
    assert (sizes["classes"], sizes["mlp.0"], sizes["head.0"]) == (7, 17, 3)
    assert sizes["resid"] == sizes["pool"] == 15  # the class ties the pooler to the stream
    assert sizes["qk.0"] == sizes["vo.0"] == Bert().head_dims(config_of()) == 5


def test_each_free_space_has_a_writer_and_a_reader_and_a_fixed_one_neither() -> None:
    atlas = Bert().atlas(config_of())
    legs = [leg for axes in atlas.axes.values() for axis in axes for leg in axis]
    for space in atlas.spaces.values():
        roles = {leg.role.value for leg in legs if leg.space == space.name}
        assert roles == ({"="} if space.kind == "fixed" else {"^", "_"})


def test_the_layout_names_modules_parameters_and_spaces_that_exist() -> None:
    model = model_of()
    layout, atlas = Bert().layout(model.config), Bert().atlas(model.config)
    assert layout.norm_order == "post" and layout.final_norm == ""
    assert layout.pooler is not None and layout.pooler.space in atlas.free
    for path in (layout.embed, layout.embed_norm, layout.head, layout.pooler.dense):
        model.get_submodule(path)
    for name in layout.embed_parameters:
        assert any(leg.space == layout.stream_space for a in atlas.axes[name] for leg in a)
    for block in layout.blocks:
        for key, value in vars(block).items():
            if key.endswith("_space"):
                assert value in atlas.free
            else:
                model.get_submodule(value)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert [layout.norm_at(depth) for depth in range(5)] == norms  # in order of execution


@pytest.mark.parametrize("tokens", [TOKENS, 4])
def test_walking_block_by_block_is_the_stock_forward_pass(tokens: int) -> None:
    model, x = model_of(), ids(5, tokens)
    layout = Bert().layout(model.config)
    with torch.no_grad():
        found = list(walk.streams(model, layout, x))
        hidden = model(input_ids=x, output_hidden_states=True).hidden_states
        top = walk.apply(model, layout.head, walk.read_out(model, layout, found[-1]))
    assert len(found) == 5 and len(hidden) == 3
    for ours, theirs in zip(found[::2], hidden, strict=True):
        # the same float64 operations, summed in the same order
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    torch.testing.assert_close(top, logits(model, x), rtol=0, atol=1e-13)


def test_what_a_norm_divides_by_is_what_turns_its_sum_into_its_output() -> None:
    model, x = model_of(), ids(5)
    layout = Bert().layout(model.config)
    norm = model.get_submodule(layout.embed_norm)
    with torch.no_grad():
        total = walk.embed_sum(model, layout, x)
        scale = walk.norm_scale(norm, total)
        by_hand = (total - total.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
        # float64: rounding only
        torch.testing.assert_close(walk.embed(model, layout, x), by_hand, rtol=0, atol=1e-13)
    assert scale.std() > 0.01  # tokens differ: a constant would not do


def test_narrow_builds_a_model_whose_shapes_are_those_of_the_fused_state() -> None:
    family, wide = Bert(), model_of()
    config = family.narrow(wide.config, NARROW)
    assert family.shape(config) == NARROW
    assert family.shape(wide.config) == WIDE  # the parent's own config is not touched
    atlas, target = family.atlas(wide.config), family.atlas(config)
    maps: dict[str, AxisMap | NestedMap] = {}
    for name in atlas.free:
        size = (atlas.spaces[name].size, target.spaces[name].size)
        maps[name] = LinearMap(torch.ones(size).double(), torch.ones(size).double())
    fused = transform(wide.state_dict(), atlas, maps)
    built = family.build(config).state_dict()
    assert {k: v.shape for k, v in fused.items()} == {k: v.shape for k, v in built.items()}
    assert built.keys() == target.axes.keys()


def test_narrowing_to_its_own_shape_is_the_same_model() -> None:
    wide = model_of()
    same = Bert().build(Bert().narrow(wide.config, WIDE)).double()
    same.load_state_dict(wide.state_dict())
    # the same float64 operations
    torch.testing.assert_close(logits(same, ids()), logits(wide, ids()), rtol=0, atol=0)


def test_the_stock_class_loads_a_saved_model_strictly(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = model_of(NARROW).float()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert type(loaded).__module__.startswith("transformers.")
    # the same float32 weights through the same operations
    torch.testing.assert_close(logits(loaded.eval(), ids()), logits(model, ids()), rtol=0, atol=0)
    ours = Bert().load(tmp_path)
    torch.testing.assert_close(logits(ours, ids()), logits(model, ids()), rtol=0, atol=0)
    assert not ours.training
    assert Bert().shape(Bert().load_config(str(tmp_path))) == NARROW


def test_a_missing_weight_a_decoder_another_family_and_no_folder_are_refused(
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig

    config = config_of(NARROW)
    config.is_decoder = True
    config.save_pretrained(tmp_path / "decoder")
    ViTConfig().save_pretrained(tmp_path / "vit")
    cases = {"decoder": "encoder", "vit": "another family", "none": "can't be opened"}
    for folder, what in cases.items():
        with pytest.raises(ParentError, match=what):
            Bert().load_config(str(tmp_path / folder))
    model_of(NARROW).float().save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    weights = load_file(file)
    del weights["bert.pooler.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ParentError, match="don't fit") as caught:
        Bert().load(tmp_path / "cut")
    assert "bert.pooler.dense.weight" in str(caught.value.got)
    file.write_bytes(b"nothing")
    with pytest.raises(ParentError, match="can't be read"):
        Bert().load(tmp_path / "cut")


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        (Shape(18, 3, 17, 2), "hidden_size"),
        (Shape(15, 5, 17, 2), "num_attention_heads"),
        (Shape(15, 3, 18, 2), "intermediate_size"),
        (Shape(15, 3, 17, 3), "num_hidden_layers"),
    ],
)
def test_a_target_that_is_larger_is_refused(shape: Shape, key: str) -> None:
    with pytest.raises(ShapeError) as caught:
        Bert().narrow(config_of(), shape)
    assert caught.value.where == f"target.{key}"
    assert str(getattr(WIDE, key)) in str(caught.value.allowed)


def test_illegal_widths_name_legal_ones() -> None:
    for heads in (2, 3):
        for width in range(1, 16):
            if width % heads == 0 and width >= 2 * heads:
                assert Bert().narrow(config_of(), Shape(width, heads, 11, 2)).hidden_size == width
                continue
            with pytest.raises(ShapeError) as caught:
                Bert().narrow(config_of(), Shape(width, heads, 11, 2))
            named = [int(w) for w in re.findall(r"\d+", str(caught.value.allowed))]
            assert named
            for near in named:  # following the advice works
                Bert().narrow(config_of(), Shape(near, heads, 11, 2))
    with pytest.raises(ShapeError, match="two units"):
        Bert().narrow(config_of(Shape(3, 3, 5, 2)), Shape(3, 2, 5, 2))


@pytest.mark.parametrize("shape", [WIDE, NARROW])
@pytest.mark.parametrize("tokens", [TOKENS, 4])
def test_flops_are_those_torch_counts(shape: Shape, tokens: int) -> None:
    model = Bert().build(config_of(shape), attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids(1, tokens))
    # exact: both count 2 per multiply-add of matrices and attention products, nothing else
    assert Bert().flops(model.config, tokens) == counter.get_total_flops()
    if tokens == TOKENS:
        assert Bert().flops(model.config) == counter.get_total_flops()


def test_queries_are_scaled_for_another_head_size() -> None:
    narrow = Bert().narrow(config_of(), Shape(9, 3, 11, 2))
    assert Bert().query_scale(config_of(), narrow) == pytest.approx((3 / 5) ** 0.5, rel=1e-15)
    assert Bert().query_scale(config_of(), config_of()) == 1


def test_mismatched_parents_are_told_apart() -> None:
    base, narrower = config_of(), config_of(NARROW)
    assert Bert().mismatches({"p": base, "q": narrower}) == []  # width alone is no mismatch
    other = config_of(vocab_size=14, positions=5)
    other.layer_norm_eps = 1e-3
    assert Bert().mismatches({"p": base, "q": narrower, "r": other}) == [
        "vocab_size: p has 13, r has 14", "max_position_embeddings: p has 6, r has 5",
        "layer_norm_eps: p has 1e-12, r has 0.001",
    ]  # fmt: skip
