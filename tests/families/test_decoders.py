"""Llama, Qwen2 and Qwen3: legs, layout, stock classes and the configs that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import duplicate, permute
from tiny_decoders import (
    DECODERS,
    EVERY,
    HEAD_DIM,
    KEY_HEADS,
    NARROW,
    TOKENS,
    VOCABULARY,
    WIDE,
    WIDER,
    build,
    config_of,
    decoder,
    ids,
    logits,
    moved,
)
from torch.utils.flop_counter import FlopCounterMode

from slimfuse.batch import Batch
from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Shape
from slimfuse.families.decoder import Decoder, kinds
from slimfuse.families.gemma3 import GainNorm
from slimfuse.fuse import walk
from slimfuse.spaces import LinearMap, transform

# float64, exact identity; logits are of order 1. Only the tables of rotary angles are float32,
# the same ones on both sides.
ALGEBRA = {"rtol": 0, "atol": 1e-11}

every_family = pytest.mark.parametrize("family", DECODERS.values(), ids=DECODERS)
both = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@every_family
@both
def test_every_parameter_is_covered_once_and_sizes_agree(family: Decoder, tied: bool) -> None:
    biased = {} if family.name in ("qwen2", "gemma3") else {"attention_bias": True}
    if family.name == "llama":
        biased["mlp_bias"] = True
    for keys in ({}, biased):
        config = config_of(family, tied=tied, **keys)
        model = family.build(config)
        atlas = family.atlas(config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        atlas.check(shapes)
        assert atlas.axes.keys() == shapes.keys()
        assert ("lm_head.weight" in shapes) is not tied
        assert set(model.state_dict()) - set(shapes) <= {"lm_head.weight"}  # no buffer left behind


@every_family
def test_sizes_and_roles_tell_the_spaces_apart(family: Decoder) -> None:
    atlas = family.atlas(config_of(family))
    sizes = {name.split(".")[0]: space.size for name, space in atlas.spaces.items()}
    assert sizes == {"vocab": 53, "resid": 36, "qk": 4, "head": 3, "group": 2, "vo": 4, "mlp": 17}
    legs = [leg for axes in atlas.axes.values() for axis in axes for leg in axis]
    for space in atlas.spaces.values():
        roles = {leg.role.value for leg in legs if leg.space == space.name}
        assert roles == ({"="} if space.kind == "fixed" else {"^", "_"})
    assert {name.split(".")[0] for name in atlas.free} == set(EVERY)


@every_family
@both
def test_the_layout_names_modules_that_exist(family: Decoder, tied: bool) -> None:
    config = config_of(family, tied=tied)
    model, layout, atlas = family.build(config), family.layout(config), family.atlas(config)
    assert (layout.readout, layout.norm, layout.tied) == ("all", "rms", tied)
    assert len(layout.blocks) == WIDE.num_hidden_layers
    for path in (layout.final_norm, layout.head):
        model.get_submodule(path)
    for name in layout.embed_parameters:
        model.get_parameter(name)
    for block in layout.blocks:
        for key, value in vars(block).items():
            if key.endswith("_space"):
                assert value in atlas.spaces
            elif key != "kind":
                model.get_submodule(value)
    assert bool(layout.blocks[0].q_norm) is (family.name in ("qwen3", "gemma3"))
    assert bool(layout.blocks[0].attention_post) is (family.name == "gemma3")


@every_family
@pytest.mark.parametrize("space", EVERY)
def test_permuting_a_space_keeps_the_logits(family: Decoder, space: str) -> None:
    model = decoder(family, tied=space == "resid")
    twisted = moved(family, model, (space,), permute)
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), twisted.parameters(), strict=True)
    )
    torch.testing.assert_close(logits(twisted), logits(model), **ALGEBRA)


@every_family
@both
@pytest.mark.parametrize("space", WIDER)
def test_duplicating_a_space_keeps_the_logits(family: Decoder, space: str, tied: bool) -> None:
    model = decoder(family, tied=tied)
    wide = moved(family, model, (space,), lambda n, _seed: duplicate(n), **WIDER[space])
    torch.testing.assert_close(logits(wide), logits(model), **ALGEBRA)


@every_family
def test_values_may_be_turned_by_any_matrix(family: Decoder) -> None:
    """The class can't double them alone; a skew map sees a wrong role as a duplication does."""
    model = decoder(family)

    def skew(size: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        push = torch.eye(size, dtype=torch.float64) + 0.3 * noise
        return LinearMap(push, torch.linalg.inv(push).T)

    torch.testing.assert_close(
        logits(moved(family, model, ("vo",), skew)), logits(model), **ALGEBRA
    )


@every_family
@both
def test_narrow_builds_the_shapes_of_the_fused_state(family: Decoder, tied: bool) -> None:
    wide = config_of(family, tied=tied)
    config = family.narrow(wide, NARROW)
    assert family.shape(config) == NARROW and family.shape(wide) == WIDE
    assert (config.head_dim, config.num_key_value_heads) == (HEAD_DIM, 2)
    atlas, target = family.atlas(wide), family.atlas(config)
    maps = {}
    for name in atlas.free:
        ones = torch.ones(atlas.spaces[name].size, target.spaces[name].size).double()
        maps[name] = LinearMap(ones, ones)
    fused = transform(dict(family.build(wide).named_parameters()), atlas, maps)
    built = dict(family.build(config).named_parameters())
    assert {k: v.shape for k, v in fused.items()} == {k: v.shape for k, v in built.items()}


@every_family
def test_narrowing_to_its_own_shape_is_the_same_model(family: Decoder) -> None:
    model = decoder(family)
    same = build(family, family.narrow(model.config, WIDE))
    same.load_state_dict(model.state_dict())
    # the same float64 operations
    torch.testing.assert_close(logits(same), logits(model), rtol=0, atol=0)


@every_family
def test_a_target_may_be_shallower(family: Decoder) -> None:
    config = family.narrow(config_of(family), Shape(36, 6, 17, 1))
    assert not any("layers.1." in name for name in family.build(config).state_dict())
    assert len(getattr(config, "layer_types", None) or [0]) == 1


@every_family
def test_heads_come_in_whole_groups(family: Decoder) -> None:
    for heads, legal in ((5, "4 or 6"), (3, "2 or 4"), (1, "2")):
        with pytest.raises(ShapeError, match="multiple") as caught:
            family.narrow(config_of(family), Shape(30, heads, 17, 2))
        assert caught.value.where == "target.num_attention_heads"
        assert caught.value.allowed == legal
        for near in legal.split(" or "):  # following the advice works
            family.narrow(config_of(family), Shape(24, int(near), 17, 2))


@every_family
def test_a_target_that_is_larger_is_refused(family: Decoder) -> None:
    with pytest.raises(ShapeError) as caught:
        family.narrow(config_of(family), Shape(36, 8, 17, 2))
    assert caught.value.where == "target.num_attention_heads"


@every_family
@both
def test_the_stock_class_loads_a_saved_model_strictly(
    family: Decoder, tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = family.build(family.narrow(config_of(family, tied=tied), NARROW))
    family.save(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded).__name__ == family.stock
    # the same float32 weights through the same operations, but for Gemma's 1 + (γ - 1)
    close = 1e-6 if family.name == "gemma3" else 0
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=0, atol=close)
    ours = family.load(tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=0)
    assert not ours.training
    config = family.load_config(str(tmp_path))
    assert family.shape(config) == NARROW and family.head_dims(config) == HEAD_DIM


@every_family
def test_another_familys_folder_is_refused(family: Decoder, tmp_path: Path) -> None:
    other = DECODERS["llama" if family.name != "llama" else "qwen3"]
    other.save(other.build(config_of(other)), tmp_path)
    with pytest.raises(ParentError, match="another family"):
        family.load_config(str(tmp_path))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_sliding_windows_are_a_kind_of_attention(name: str, tmp_path: Path) -> None:
    family = DECODERS[name]
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    family.save(family.build(config_of(family, **window)), tmp_path)
    config = family.load_config(str(tmp_path))
    kinds_ = [block.kind for block in family.layout(config).blocks]
    assert kinds_ == ["full_attention", "sliding_attention"]
    narrowed = family.narrow(config, NARROW)
    assert narrowed.layer_types == config.layer_types and narrowed.sliding_window == 3


def test_a_block_has_full_attention_where_its_share_has_one_with_it() -> None:
    near, full = "sliding_attention", "full_attention"
    gemma = ([near] * 5 + [full]) * 2
    assert kinds(gemma, 12) == gemma
    assert kinds(gemma, 6) == [near, near, full, near, near, full]
    assert kinds(gemma, 4) == [near, full, near, full]
    assert kinds(gemma, 1) == [full]
    assert kinds([near] * 7, 3) == [near] * 3


@pytest.mark.parametrize(
    "keys", [{"attention_bias": True}, {"final_logit_softcapping": 30.0},
             {"use_bidirectional_attention": True}],
)  # fmt: skip
def test_a_gemma_of_another_kind_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    family = DECODERS["gemma3"]
    config_of(family, **keys).save_pretrained(tmp_path)
    with pytest.raises(ParentError, match="of this kind") as caught:
        family.load_config(str(tmp_path))
    assert next(iter(keys)) in str(caught.value.got)


def test_gemma_s_norms_are_working_forms_and_saved_as_the_class_has_them() -> None:
    family = DECODERS["gemma3"]
    model = decoder(family)
    stock: Any = family.stock_form(model)
    assert type(stock).__name__ == family.stock
    assert not any(isinstance(m, GainNorm) for m in stock.modules())
    ours, theirs = model.model.norm, stock.model.norm
    torch.testing.assert_close(theirs.weight, ours.weight - 1, rtol=0, atol=0)
    assert isinstance(ours, GainNorm) and model.model.norm is ours  # the model stays as it was
    assert stock.lm_head.weight is model.lm_head.weight
    # the class' norms compute in float32
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)


@every_family
def test_the_generation_config_is_kept(family: Decoder, tmp_path: Path) -> None:
    model: Any = family.build(config_of(family))
    model.generation_config.max_new_tokens = 7
    family.save(model, tmp_path)
    ours: Any = family.load(tmp_path)
    assert ours.generation_config.max_new_tokens == 7


@every_family
@pytest.mark.parametrize("tokens", [TOKENS, 4])
def test_flops_are_those_torch_counts(family: Decoder, tokens: int) -> None:
    for shape in (WIDE, NARROW):
        config = family.narrow(config_of(family), shape)
        model = family.build(config, attention="eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids(1, tokens=tokens))
        # exact: both count 2 per multiply-add of matrices and attention products, nothing else
        assert family.flops(config, tokens) == counter.get_total_flops()
        if tokens == TOKENS:
            assert family.flops(config) == counter.get_total_flops()


@every_family
def test_heads_keep_their_size(family: Decoder) -> None:
    wide = config_of(family)
    assert family.query_scale(wide, family.narrow(wide, NARROW)) == 1
    assert family.head_dims(config_of(family, head_dim=None)) == 36 // 6
    assert family.group(wide) == 6 // KEY_HEADS


@every_family
def test_mismatched_parents_are_told_apart(family: Decoder) -> None:
    base = config_of(family)
    for other in (family.narrow(base, NARROW), config_of(family, tied=True)):
        assert family.mismatches({"p": base, "q": other}) == []
    scale = {"query_pre_attn_scalar": HEAD_DIM} if family.name == "gemma3" else {}
    other = config_of(family, key_heads=6, head_dim=6, vocab_size=VOCABULARY + 1, **scale)
    assert family.mismatches({"p": base, "q": other}) == [
        "vocab_size: p has 53, q has 54",
        "head_dim: p has 4, q has 6",
        "query_heads_per_key: p has 2, q has 1",
    ]


@every_family
@both
def test_the_streams_are_the_stock_models_hidden_states(family: Decoder, tied: bool) -> None:
    model = decoder(family, tied=tied)
    layout = family.layout(model.config)
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, 4:] = 0
    batch = Batch({"input_ids": ids(3), "attention_mask": mask})
    with torch.no_grad():
        found = list(walk.streams(model, layout, batch))
        want = model(**batch.arguments, output_hidden_states=True)
        top = walk.read_out(model, layout, found[-1], mask.bool())
        told = walk.apply(model, layout.head, top)
    real = mask.bool()
    # the stock class' last hidden state stands behind the final norm
    for ours, theirs in zip(found[:-1:2], want.hidden_states[:-1], strict=True):
        torch.testing.assert_close(ours[real], theirs[real], **ALGEBRA)
    torch.testing.assert_close(told, want.logits[real], **ALGEBRA)
