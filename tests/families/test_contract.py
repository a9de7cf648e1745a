"""What every family has to keep, on tiny random models in float64."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import shake
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slimfuse.errors import ShapeError
from slimfuse.families import FAMILIES, Family, Shape
from slimfuse.spaces import AxisMap, LinearMap, NestedMap, transform

WIDE = Shape(15, 3, 17, 2)
NARROW = Shape(8, 2, 11, 2)
LABELS = ("a", "b", "c", "d", "e", "f", "g")

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def config_of(family: Family, shape: Shape = WIDE) -> Any:
    return family.new_config(shape, patch_size=2, image_size=6, labels=LABELS)


def model_of(family: Family, shape: Shape = WIDE) -> Any:
    return shake(family.build(config_of(family, shape)).double(), seed=0)


def pixels(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(pixel_values=x).logits
    return out


@every_family
def test_every_parameter_is_covered_once_and_sizes_agree(family: Family) -> None:
    model = model_of(family)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    atlas = family.atlas(model.config)
    atlas.check(shapes)
    assert atlas.axes.keys() == shapes.keys()  # said by the check too; here independently
    assert all(atlas.shape(name) == shape for name, shape in shapes.items())
    assert model.state_dict().keys() == shapes.keys()  # no buffer is left behind


@every_family
def test_sizes_of_spaces_are_told_apart_by_the_shapes(family: Family) -> None:
    """Odd, distinct sizes: the check above can't be fooled by two spaces of one size."""
    sizes = {s.kind: s.size for s in family.atlas(config_of(family)).spaces.values()}
    assert sizes["stream"] == 15 and sizes["mlp"] == 17 and sizes["head"] == 3
    assert sizes["qk"] == sizes["vo"] == family.head_dims(config_of(family)) == 5


@every_family
def test_each_free_space_has_a_writer_and_a_reader(family: Family) -> None:
    atlas = family.atlas(config_of(family))
    legs = [leg for axes in atlas.axes.values() for axis in axes for leg in axis]
    for name in atlas.free:
        assert {leg.role.value for leg in legs if leg.space == name} == {"^", "_"}
    for space in atlas.spaces.values():
        if space.kind == "fixed":
            assert {leg.role.value for leg in legs if leg.space == space.name} == {"="}


@every_family
def test_the_layout_names_modules_and_spaces_that_exist(family: Family) -> None:
    model = model_of(family)
    layout, atlas = family.layout(model.config), family.atlas(model.config)
    assert len(layout.blocks) == WIDE.num_hidden_layers
    for path in (layout.embed, layout.final_norm, layout.head):
        model.get_submodule(path)
    for name in layout.embed_parameters:
        assert any(leg.space == layout.stream_space for a in atlas.axes[name] for leg in a)
    for block in layout.blocks:
        for key, value in vars(block).items():
            if key.endswith("_space"):
                assert value in atlas.free
            else:
                model.get_submodule(value)


@every_family
def test_narrow_builds_a_model_whose_shapes_are_those_of_the_fused_state(family: Family) -> None:
    wide = model_of(family)
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


@every_family
def test_narrowing_to_its_own_shape_is_the_same_model(family: Family) -> None:
    wide = model_of(family)
    same = family.build(family.narrow(wide.config, WIDE)).double()
    same.load_state_dict(wide.state_dict())
    # the same float64 operations
    torch.testing.assert_close(logits(same, pixels()), logits(wide, pixels()), rtol=0, atol=0)


@every_family
def test_the_stock_class_loads_a_saved_model_strictly(family: Family, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    config = family.narrow(config_of(family), NARROW)
    model: Any = shake(family.build(config), seed=0)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert type(loaded).__module__.startswith("transformers.")
    x = pixels().float()
    # the same float32 weights through the same operations
    torch.testing.assert_close(logits(loaded.eval(), x), logits(model, x), rtol=0, atol=0)
    ours = family.load(tmp_path)
    torch.testing.assert_close(logits(ours, x), logits(model, x), rtol=0, atol=0)
    assert not ours.training
    assert family.shape(family.load_config(str(tmp_path))) == NARROW


@every_family
def test_illegal_widths_name_legal_ones_and_the_nearest(family: Family) -> None:
    parent = config_of(family)
    legal, told = [], 0
    for heads in (1, 2, 3):
        for width in range(1, 16):
            shape = Shape(width, heads, 11, 2)
            try:
                legal.append((family.narrow(parent, shape).hidden_size, heads))
            except ShapeError as error:
                told += 1
                assert str(width) in str(error) and str(heads) in str(error)
                named = [int(w) for w in re.findall(r"\d+", str(error.allowed))]
                assert named
                for near in named:  # following the advice works
                    family.narrow(parent, Shape(near, heads, 11, 2))
                # nothing legal is nearer than the nearest that is named
                best = min(abs(near - width) for near in named)
                for gap in range(best):
                    for other in (width - gap, width + gap):
                        with pytest.raises(ShapeError):
                            family.narrow(parent, Shape(other, heads, 11, 2))
    assert told and legal == [
        (width, heads) for heads in (1, 2, 3) for width in range(2 * heads, 16, heads)
    ]


@every_family
@pytest.mark.parametrize(
    ("shape", "key"),
    [
        (Shape(18, 3, 17, 2), "hidden_size"),
        (Shape(15, 5, 17, 2), "num_attention_heads"),
        (Shape(15, 3, 18, 2), "intermediate_size"),
        (Shape(15, 3, 17, 3), "num_hidden_layers"),
    ],
)
def test_a_target_that_is_larger_is_refused(family: Family, shape: Shape, key: str) -> None:
    with pytest.raises(ShapeError) as caught:
        family.narrow(config_of(family), shape)
    assert caught.value.where == f"target.{key}"
    assert str(getattr(WIDE, key)) in str(caught.value.allowed)


@every_family
def test_too_many_heads_for_any_width_are_refused(family: Family) -> None:
    with pytest.raises(ShapeError, match="two units") as caught:
        family.narrow(config_of(family, Shape(3, 3, 5, 2)), Shape(3, 2, 5, 2))
    assert caught.value.allowed == "num_attention_heads up to 1"


@every_family
@pytest.mark.parametrize("shape", [WIDE, NARROW])
def test_flops_are_those_torch_counts(family: Family, shape: Shape) -> None:
    model = family.build(config_of(family, shape), attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels(1).float())
    # exact: both count 2 per multiply-add of convolutions, matrices and attention products, and
    # neither counts biases, norms, softmax or the activation
    assert family.flops(model.config) == counter.get_total_flops()


@every_family
def test_queries_are_scaled_for_another_head_size(family: Family) -> None:
    wide = config_of(family)
    narrow = family.narrow(wide, Shape(9, 3, 11, 2))
    assert family.query_scale(wide, narrow) == pytest.approx((3 / 5) ** 0.5, rel=1e-15)
    assert family.query_scale(wide, wide) == 1


@every_family
def test_mismatched_parents_are_told_apart(family: Family) -> None:
    base = config_of(family)
    narrower = config_of(family, NARROW)
    assert family.mismatches({"p": base, "q": narrower}) == []  # width alone is no mismatch
    deeper = config_of(family, Shape(15, 3, 17, 3))
    assert family.mismatches({"p": base, "q": deeper}) == []  # nor is depth
    relabelled = family.new_config(WIDE, patch_size=2, image_size=6, labels=LABELS[:3])
    assert family.mismatches({"p": base, "q": relabelled}) == []  # the pipeline unites labels
    others = family.new_config(WIDE, patch_size=3, image_size=6, labels=LABELS)
    others.layer_norm_eps = 1e-3
    assert family.mismatches({"p": base, "q": narrower, "r": others}) == [
        "patch_size: p has 2, r has 3", "layer_norm_eps: p has 1e-12, r has 0.001",
    ]  # fmt: skip


@every_family
@pytest.mark.parametrize("depth", [1, 2])
def test_a_target_may_be_shallower(family: Family, depth: int) -> None:
    wide = config_of(family)
    shallow = family.narrow(wide, Shape(15, 3, 17, depth))
    assert family.shape(shallow).num_hidden_layers == depth
    assert len(family.layout(shallow).blocks) == depth
    assert family.shape(wide) == WIDE  # the parent's config is only read
    state = family.build(shallow).state_dict()
    assert set(family.atlas(shallow).axes) == set(state)
    wanted = {n for n in model_of(family).state_dict() if depth == 2 or "layers.1." not in n}
    assert set(state) == wanted


@pytest.fixture(scope="module")
def graph() -> Any:
    """Torch-pruning's dependency graph of a ViT, traced by it alone."""
    import torch_pruning as tp

    model = model_of(FAMILIES["vit"]).float()
    with warnings.catch_warnings():
        # it announces the class token and the positions, whose last axis it prunes, as we expect
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        found = tp.DependencyGraph().build_dependency(
            model,
            example_inputs={"pixel_values": pixels(2).float()},
            forward_fn=lambda m, x: m(**x).logits,
        )
    return model, found


def coupled(graph: Any, layer: str) -> set[tuple[str, int]]:
    """Return the (parameter, axis) pairs that lose a unit with an output unit of `layer`."""
    import torch_pruning as tp

    model, dependencies = graph
    names = {id(p): name for name, p in model.named_parameters()}
    start = model.get_submodule(layer)
    found = set()
    for dep, _ in dependencies.get_pruning_group(start, tp.prune_linear_out_channels, idxs=[0]):
        module, side = dep.target.module, dep.handler.__name__
        if isinstance(module, nn.Parameter):
            found.add((names[id(module)], module.ndim - 1))
        elif isinstance(module, nn.Linear | nn.Conv2d) and side == "prune_in_channels":
            found.add((names[id(module.weight)], 1))
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            found |= {(names[id(p)], 0) for p in module.parameters(recurse=False)}
    return found


def declared(space: str) -> set[tuple[str, int]]:
    atlas = FAMILIES["vit"].atlas(config_of(FAMILIES["vit"]))
    return {
        (name, dim)
        for name, axes in atlas.axes.items()
        for dim, axis in enumerate(axes)
        if any(leg.space == space for leg in axis)
    }


@pytest.mark.parametrize(
    ("layer", "space"),
    [
        ("vit.layers.0.mlp.fc2", "resid"),
        ("vit.layers.1.attention.o_proj", "resid"),
        ("vit.layers.0.mlp.fc1", "mlp.0"),
        ("vit.layers.1.mlp.fc1", "mlp.1"),
        ("vit.layers.0.attention.v_proj", "head.0"),
        ("vit.layers.1.attention.q_proj", "head.1"),
    ],
)
def test_vit_spaces_are_torch_prunings_groups(graph: Any, layer: str, space: str) -> None:
    assert coupled(graph, layer) == declared(space)
