"""timm's ViT: the families' contract, its own choices, folders that both worlds open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import test_contract, test_fusing
from families.cases import IMAGE, IMAGES, LABELS, Case, logits, shaken
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Shape
from slimfuse.families.timm_vit import TimmViT
from slimfuse.fuse import walk
from slimfuse.fuse.refit import Parent, Settings, refit

SAME = {"rtol": 0, "atol": 0}  # the same operations on the same numbers
ROUNDED = {"rtol": 0, "atol": 1e-6}  # float32: one product of q, k and v, or three
POOLED = {"class_token": False, "global_pool": "avg", "fc_norm": True}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": POOLED,
    "average-normed-first": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "qkv_bias": False},
    "registers-average": {"reg_tokens": 2, "global_pool": "avg", "fc_norm": True},
}
CASES = [Case(name, TimmViT(), IMAGES, {**IMAGE, **own}) for name, own in KINDS.items()]
kinds = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
FEATURES = TimmViT("feature-extraction")

CONTRACT: list[Callable[[Case], None]] = [
    test_contract.test_every_parameter_is_covered_once_and_sizes_agree,
    test_contract.test_sizes_of_spaces_are_told_apart_by_the_shapes,
    test_contract.test_each_free_space_has_a_writer_and_a_reader_and_a_fixed_one_neither,
    test_contract.test_permuting_a_space_keeps_the_logits,
    test_contract.test_duplicating_spaces_keeps_the_logits,
    test_contract.test_the_layout_names_modules_parameters_and_spaces_that_exist,
    test_contract.test_narrow_builds_a_model_whose_shapes_are_those_of_the_fused_state,
    test_contract.test_narrowing_to_its_own_shape_is_the_same_model,
    test_contract.test_illegal_widths_name_legal_ones_and_the_nearest,
    test_contract.test_too_many_heads_for_any_width_are_refused,
    test_contract.test_flops_are_those_torch_counts,
    test_contract.test_queries_are_scaled_for_another_head_size,
    test_contract.test_mismatched_parents_are_told_apart,
]
FUSING: list[Callable[[Case], None]] = [
    test_fusing.test_a_copy_with_twice_the_units_in_another_order_fuses_into_the_model,
    test_fusing.test_a_model_fuses_with_its_permuted_copy_into_itself,
    test_fusing.test_a_narrow_target_is_closer_than_a_random_one,
]


def small(x: Batch) -> Tensor:
    """Return a batch's images in float32."""
    return x.arguments["pixel_values"].float()


def stock_model(seed: int = 0, **arguments: Any) -> Any:
    """Return a random timm model of odd sizes as timm makes it."""
    sizes = {"img_size": 6, "patch_size": 2, "embed_dim": 15, "depth": 2, "num_heads": 3}
    name = arguments.pop("name", "vit_tiny_patch16_224")
    arguments = {**sizes, "mlp_ratio": 17.5 / 15, "num_classes": len(LABELS), **arguments}
    torch.manual_seed(seed)
    return shaken(timm.create_model(name, **arguments).eval(), seed)


def saved(folder: Path, model: Any, **own: Any) -> Path:
    """Save a timm model as timm does."""
    timm.models.save_for_hf(
        model, str(folder), model_config={"label_names": list(LABELS), **own},
        safe_serialization=True,
    )  # fmt: skip
    return folder


def opened(folder: Path) -> Any:
    """Return what timm makes of a folder; it is strict where the classes are the saved ones."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


# ---- the contract ----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__.removeprefix("test_"))
def test_the_contract_holds(case: Case, test: Callable[[Case], None]) -> None:
    test(case)


@kinds
def test_walking_block_by_block_is_the_stock_forward_pass(case: Case) -> None:
    test_contract.test_walking_block_by_block_is_the_stock_forward_pass(case, 6)


@kinds
@pytest.mark.parametrize("test", FUSING, ids=lambda test: test.__name__.removeprefix("test_"))
def test_fusing_is_exact_where_it_can_be(case: Case, test: Callable[[Case], None]) -> None:
    test(case)


@kinds
@pytest.mark.parametrize("depth", [1, 2])
def test_a_target_may_be_shallower(case: Case, depth: int) -> None:
    test_contract.test_a_target_may_be_shallower(case, depth)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c.name != "plain"), id=c.name) for c in CASES],
)
def test_the_exported_graph_gives_the_logits_at_two_other_shapes(
    case: Case, tmp_path: Path
) -> None:
    import onnxruntime

    from slimfuse.onnx import export_onnx

    config = case.family.narrow(case.config(), case.narrow)
    model = shaken(case.family.build(config, attention="eager"), seed=0).float()
    file, cpu = tmp_path / "model.onnx", torch.device("cpu")
    export_onnx(case.family.stock_form(model), case.batch(2).to(cpu, torch.float32), file, opset=20)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n in (1, 5):
        x = case.batch(n).to(cpu, torch.float32)
        (found,) = session.run(None, {"pixel_values": small(x).numpy()})
        # float32, two blocks: the runtime sums in another order
        torch.testing.assert_close(torch.from_numpy(found), logits(model, x), rtol=0, atol=1e-5)


# ---- folders ---------------------------------------------------------------------------------


@kinds
def test_timm_and_transformers_open_a_saved_model(case: Case, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    family, x = case.family, case.batch().to(torch.device("cpu"), torch.float32)
    model = shaken(family.build(family.narrow(case.config(), case.narrow)), 0).float()
    family.save(model, tmp_path)
    own, want = opened(tmp_path), logits(model, x)
    assert type(own) is timm.models.VisionTransformer
    with torch.no_grad():
        torch.testing.assert_close(own(small(x)), want, **ROUNDED)
    wrapped, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()) and list(wrapped.config.id2label.values()) == list(LABELS)
    torch.testing.assert_close(logits(wrapped.eval(), x), want, **ROUNDED)
    ours = family.load(tmp_path)
    torch.testing.assert_close(logits(ours, x), want, **SAME)
    config = family.load_config(str(tmp_path))
    assert family.shape(config) == case.narrow and not ours.training
    assert config.id2label == dict(enumerate(LABELS)) and config == ours.config
    family.save(ours, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("arguments", [{}, {**POOLED, "reg_tokens": 1}, {"qkv_bias": False}])
def test_scales_are_folded_and_not_saved(arguments: dict[str, Any], tmp_path: Path) -> None:
    parent = stock_model(init_values=0.1, dynamic_img_size=True, **arguments)
    assert any("ls1.gamma" in name for name in parent.state_dict())
    model = TimmViT().load(saved(tmp_path / "parent", parent))
    x = CASES[0].batch().to(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        want = parent(small(x))
        # float32: λ (W h) and (λ W) h are rounded at other places
        torch.testing.assert_close(logits(model, x), want, rtol=0, atol=1e-5)
        TimmViT().save(model, tmp_path / "child")
        child = opened(tmp_path / "child")
        assert not any(".ls" in name for name in child.state_dict())
        torch.testing.assert_close(child(small(x)), want, rtol=0, atol=1e-5)


def test_no_width_of_an_mlp_is_misrounded() -> None:
    """int(dim · ratio) with ratio = hidden / dim is one less for 3 % of these pairs."""
    family = TimmViT()
    for width in range(8, 400, 8):
        for inner in range(1, 4 * width, 7):
            shape = Shape(width, 1, inner, 1)
            config = family.new_config(shape, patch_size=2, image_size=6)
            assert int(width * config.arguments()["mlp_ratio"]) == inner


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "vit_base_patch16_clip_224"}, "pre_norm"),
        ({"qk_norm": True}, "qk_norm"),
        ({"global_pool": "map"}, "global_pool 'map'"),
        ({"global_pool": "avgmax"}, "global_pool 'avgmax'"),
        ({"name": "vit_small_patch16_18x2_224"}, "ParallelThingsBlock"),
        ({"name": "vit_giant_patch14_dinov2", "mlp_ratio": 2}, "GluMlp"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "VisionTransformerDistilled"),
        ({"proj_bias": False}, "proj_bias"),
        ({"pos_embed": "none"}, "positions"),
        ({"final_norm": False}, "last norms"),
    ],
)
def test_other_parts_are_refused_by_name(
    arguments: dict[str, Any], told: str, tmp_path: Path
) -> None:
    saved(tmp_path, stock_model(**arguments))
    for read in (TimmViT().load, lambda folder: TimmViT().load_config(str(folder))):
        with pytest.raises(ParentError) as caught:
            read(tmp_path)
        assert told in str(caught.value.got)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, stock_model())
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["spare.weight"] = weights.pop("head.bias")
    weights["norm.bias"] = torch.zeros(9)
    save_file(weights, file)
    with pytest.raises(ParentError, match="don't fit its config") as caught:
        TimmViT().load(tmp_path)
    assert all(name in str(caught.value.got) for name in ("spare.weight", "head.bias", "norm.bias"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ParentError, match="can't be read"):
        TimmViT().load(tmp_path)
    file.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")  # never read
    with pytest.raises(ParentError, match="can't be read"):
        TimmViT().load(tmp_path)


def test_what_is_no_timm_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match="no timm model"):
        TimmViT().load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_of_mine"}))
    with pytest.raises(ParentError, match="can't build"):
        TimmViT().load(tmp_path)


def test_targets_larger_than_parents_are_refused() -> None:
    family, config = TimmViT(), CASES[0].config()
    with pytest.raises(ShapeError, match="larger"):
        family.narrow(config, Shape(15, 3, 18, 2))


# ---- without a head --------------------------------------------------------------------------


def test_the_body_of_a_classifier_gives_features(tmp_path: Path) -> None:
    parent = stock_model()
    model = FEATURES.load(saved(tmp_path, parent))
    x = CASES[0].batch().to(torch.device("cpu"), torch.float32)
    layout = FEATURES.layout(model.config)
    assert layout.head == "" and layout.readout == 0
    assert FEATURES.atlas(model.config).axes.keys() == model.state_dict().keys()
    with torch.no_grad():
        last = model(**x.arguments).last_hidden_state
        torch.testing.assert_close(last, parent.forward_features(small(x)), **ROUNDED)
        pooled = parent.forward_head(parent.forward_features(small(x)), pre_logits=True)
        torch.testing.assert_close(walk.pooled(layout, last, None), pooled, **ROUNDED)
        FEATURES.save(model, tmp_path / "body")
        body = opened(tmp_path / "body")
        assert body.num_classes == 0
        torch.testing.assert_close(body(small(x)), pooled, **ROUNDED)
    with pytest.raises(ParentError, match="has no head"):
        TimmViT().load(tmp_path / "body")


def test_features_normed_behind_the_pooling_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match="behind its pooling"):
        FEATURES.load(saved(tmp_path, stock_model(**POOLED)))


# ---- half the width --------------------------------------------------------------------------


def test_a_half_is_closer_than_a_random_start(tmp_path: Path) -> None:
    parent = TimmViT().load(saved(tmp_path, stock_model(embed_dim=24, init_values=0.3)))
    config = TimmViT().narrow(parent.config, Shape(12, 3, 9, 2))
    x = CASES[0].batch(64).to(torch.device("cpu"), torch.float32)
    child = TimmViT().build(config)
    refit([Parent("p", parent)], child, TimmViT(), lambda: x.split(16), Settings(), n_batches=4)
    want, random = logits(parent, x), logits(TimmViT().build(config), x)
    spread = float((want - want.mean(0)).square().sum())
    missed = float((logits(child, x) - want).square().sum()) / spread
    # random weights miss by the whole spread, and more
    assert missed < 0.5 < float((random - want).square().sum()) / spread


def test_finetuning_trains_every_part_of_the_working_form(tmp_path: Path) -> None:
    model = TimmViT().build(CASES[0].config())
    x = CASES[0].batch().to(torch.device("cpu"), torch.float32)
    model(**x.arguments).logits.square().sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    assert not still
    before = logits(model, x)
    with torch.no_grad():
        model.get_parameter("timm.blocks.0.attn.qkv.v.weight").mul_(2)
    TimmViT().save(model, tmp_path)
    assert not torch.equal(before, logits(model, x))
    with torch.no_grad():
        torch.testing.assert_close(opened(tmp_path)(small(x)), logits(model, x), **ROUNDED)


def test_the_attention_asked_for_is_used() -> None:
    config = CASES[0].config()
    for kind, fused in (("eager", False), ("sdpa", True)):
        blocks: Any = TimmViT().build(config, attention=kind).timm.blocks
        assert {block.attn.fused_attn for block in blocks} == {fused}


def test_counts_need_no_memory() -> None:
    with torch.device("meta"):
        model: nn.Module = TimmViT().build(CASES[0].config())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = TimmViT().build(CASES[0].config())
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in real.parameters()) > 0
