"""GPT-2: legs, layout, working form and stock class, tied and untied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import VOCABULARY, Case, logits, permuted, widened
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Shape
from slimfuse.families.gpt2 import GPT2
from slimfuse.fuse import walk
from slimfuse.spaces import LinearMap, transform

ALGEBRA = {"rtol": 0, "atol": 1e-12}  # float64, exact identity; logits are of order 1
SAME = {"rtol": 0, "atol": 0}  # the same operations on the same numbers
TOKENS = 6
INPUTS = {
    "vocab_size": VOCABULARY,
    "positions": TOKENS,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASE = Case("gpt2", GPT2(), "AutoModelForCausalLM", INPUTS)
FAMILY = CASE.family
both = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
NORM = "transformer.ln_f"


@both
def test_every_parameter_is_covered_once_and_sizes_agree(tied: bool) -> None:
    model = CASE.model(tied=tied)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    atlas = FAMILY.atlas(model.config)
    atlas.check(shapes)
    assert atlas.axes.keys() == shapes.keys()
    assert ("lm_head.weight" in shapes) is not tied
    assert set(model.state_dict()) - set(shapes) <= {"lm_head.weight"}  # no buffer left behind
    sizes = {name.split(".")[0]: space.size for name, space in atlas.spaces.items()}
    assert sizes == {"vocab": 13, "positions": 6, "resid": 15, "head": 3, "qk": 5, "vo": 5,
                     "mlp": 17}  # fmt: skip


def test_each_free_space_has_a_writer_and_a_reader_and_a_fixed_one_neither() -> None:
    atlas = FAMILY.atlas(CASE.config(tied=False))
    legs = [leg for axes in atlas.axes.values() for axis in axes for leg in axis]
    for space in atlas.spaces.values():
        roles = {leg.role.value for leg in legs if leg.space == space.name}
        assert roles == ({"="} if space.kind == "fixed" else {"^", "_"})


@both
@pytest.mark.parametrize("space", ["resid", "head", "qk", "vo", "mlp"])
def test_permuting_a_space_keeps_the_logits(space: str, tied: bool) -> None:
    model, x = CASE.model(tied=tied), CASE.batch()
    twisted = permuted(CASE, model, (space,))
    pairs = zip(model.parameters(), twisted.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    torch.testing.assert_close(logits(twisted, x), logits(model, x), **ALGEBRA)


def doubled(model: Any, spaces: tuple[str, ...], shape: Shape) -> Any:
    """Return the model with two copies of every unit; a tied head's factor is its norm's."""
    tied = model.config.tie_word_embeddings
    inputs = {key: getattr(model.config, key) for key in ("vocab_size", "layer_norm_epsilon")}
    wide = widened(CASE, model, spaces, shape, tied=tied, **inputs)
    if tied and "resid" in spaces:
        with torch.no_grad():
            for p in wide.get_submodule(NORM).parameters():
                p /= 2
    return wide


@both
@pytest.mark.parametrize(
    ("spaces", "shape"),
    [
        (("resid", "mlp", "head"), Shape(30, 6, 34, 2)),
        (("resid", "mlp", "qk", "vo"), Shape(30, 3, 34, 2)),
        (("mlp",), Shape(15, 3, 34, 2)),
    ],
)
def test_duplicating_spaces_keeps_the_logits(
    spaces: tuple[str, ...], shape: Shape, tied: bool
) -> None:
    model, x = CASE.model(tied=tied), CASE.batch()
    wide = doubled(model, spaces, shape)
    torch.testing.assert_close(logits(wide, x), logits(model, x), **ALGEBRA)


@both
@pytest.mark.parametrize("tokens", [6, 4])
def test_walking_block_by_block_is_the_stock_forward_pass(tokens: int, tied: bool) -> None:
    model, x = CASE.model(tied=tied), CASE.batch(5, tokens)
    layout = FAMILY.layout(model.config)
    assert (layout.norm, layout.tied, layout.readout) == ("layer", tied, "all")
    with torch.no_grad():
        begun = walk.start(model, layout, x)
        found = list(walk.streams_from(model, layout, begun))
        stock = FAMILY.stock_form(model)(**x.arguments, output_hidden_states=True)
        read = walk.read_out(model, layout, found[-1], begun.mask)
        top = walk.apply(model, layout.head, read)
    assert begun.mask is not None and len(found) == 5
    # the working form adds up products of other sizes; the stock's last state is behind its norm
    for ours, theirs in zip(found[:-1:2], stock.hidden_states[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, **ALGEBRA)
    torch.testing.assert_close(top, stock.logits[begun.mask], **ALGEBRA)


@both
def test_narrow_builds_the_shapes_of_the_fused_state(tied: bool) -> None:
    wide = CASE.config(tied=tied)
    for shape in (CASE.narrow, Shape(9, 3, 5, 1)):
        config = FAMILY.narrow(wide, shape)
        assert FAMILY.shape(config) == shape and FAMILY.shape(wide) == CASE.wide
    config = FAMILY.narrow(wide, CASE.narrow)
    atlas, target = FAMILY.atlas(wide), FAMILY.atlas(config)
    maps = {}
    for name in atlas.free:
        ones = torch.ones(atlas.spaces[name].size, target.spaces[name].size).double()
        maps[name] = LinearMap(ones, ones)
    fused = transform(dict(FAMILY.build(wide).named_parameters()), atlas, maps)
    built = dict(FAMILY.build(config).named_parameters())
    assert {k: v.shape for k, v in fused.items()} == {k: v.shape for k, v in built.items()}


def test_an_mlp_of_no_said_width_is_four_times_as_wide() -> None:
    from transformers import GPT2Config

    assert FAMILY.shape(GPT2Config(n_embd=12, n_head=3, n_layer=2)) == Shape(12, 3, 48, 2)


def test_illegal_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="multiple"):
        FAMILY.narrow(CASE.config(), Shape(10, 3, 11, 2))
    with pytest.raises(ShapeError, match="larger"):
        FAMILY.narrow(CASE.config(), Shape(15, 5, 17, 2))


@both
def test_the_stock_class_loads_a_saved_model_strictly(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = FAMILY.build(FAMILY.narrow(CASE.config(tied=tied), CASE.narrow))
    model.generation_config.max_new_tokens = 7
    FAMILY.save(model, tmp_path)
    assert FAMILY.shape(model.config) == CASE.narrow  # saving leaves the model as it was
    assert isinstance(model.get_submodule("transformer.h.0.attn.c_attn.q"), nn.Linear)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded).__name__ == FAMILY.stock
    x = CASE.batch().to(torch.device("cpu"), torch.float32)
    # float32: the stock class adds up its products as one matrix
    torch.testing.assert_close(logits(loaded.eval(), x), logits(model, x), rtol=0, atol=1e-6)
    ours = FAMILY.load(tmp_path)
    torch.testing.assert_close(logits(ours, x), logits(model, x), **SAME)
    assert not ours.training and ours.generation_config.max_new_tokens == 7
    assert FAMILY.shape(FAMILY.load_config(str(tmp_path))) == CASE.narrow


def test_the_stock_form_shares_what_it_need_not_change() -> None:
    model = CASE.model()
    stock = FAMILY.stock_form(model)
    assert type(stock).__name__ == FAMILY.stock
    assert isinstance(stock.get_submodule("transformer.h.1.mlp.c_fc"), Conv1D)
    assert stock.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")
    assert stock.get_parameter("transformer.wte.weight") is stock.get_parameter("lm_head.weight")


@pytest.mark.parametrize("key", ["add_cross_attention", "scale_attn_by_inverse_layer_idx"])
def test_unknown_attention_is_refused(key: str, tmp_path: Path) -> None:
    config = CASE.config(**{key: True})
    config.save_pretrained(tmp_path)
    with pytest.raises(ParentError, match="of this kind") as caught:
        FAMILY.load_config(str(tmp_path))
    assert key in str(caught.value.got)


@pytest.mark.parametrize("tokens", [TOKENS, 4])
def test_flops_are_those_torch_counts(tokens: int) -> None:
    for shape in (CASE.wide, CASE.narrow):
        config = FAMILY.narrow(CASE.config(), shape)
        model = FAMILY.build(config, attention="eager").double()
        with FlopCounterMode(display=False) as counter:
            logits(model, CASE.batch(1, tokens))
        # exact: both count 2 per multiply-add of matrices and attention products, nothing else
        assert FAMILY.flops(config, tokens) == counter.get_total_flops()
    assert FAMILY.flops(config) == FAMILY.flops(config, TOKENS)


def test_queries_are_scaled_for_another_head_size() -> None:
    wide = CASE.config()
    narrow = FAMILY.narrow(wide, Shape(9, 3, 11, 2))
    assert FAMILY.query_scale(wide, narrow) == pytest.approx((3 / 5) ** 0.5, rel=1e-15)
    plain = CASE.config(scale_attn_weights=False)
    assert FAMILY.query_scale(plain, FAMILY.narrow(plain, Shape(9, 3, 11, 2))) == 1


def test_mismatched_parents_are_told_apart() -> None:
    base = CASE.config()
    for other in (FAMILY.narrow(base, CASE.narrow), CASE.config(tied=False)):
        assert FAMILY.mismatches({"p": base, "q": other}) == []
    other = CASE.config(positions=5, scale_attn_weights=False)
    assert FAMILY.mismatches({"p": base, "q": other}) == [
        "n_positions: p has 6, q has 5",
        "scale_attn_weights: p has True, q has False",
    ]
