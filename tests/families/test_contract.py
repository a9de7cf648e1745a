"""What every family has to keep, on tiny random models in float64."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import (
    CASES,
    LABELS,
    Case,
    any_depth,
    any_heads,
    deeper,
    every,
    every_refit,
    every_text,
    logits,
    permuted,
    widened,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimfuse.batch import Batch, call
from slimfuse.errors import ShapeError
from slimfuse.families import Shape
from slimfuse.fuse import walk
from slimfuse.spaces import AxisMap, LinearMap, NestedMap, Role, transform

ALGEBRA = {"rtol": 0, "atol": 1e-12}  # float64, exact identity; logits are of order 1
SAME = {"rtol": 0, "atol": 0}  # the same operations on the same numbers
DEPTH = 2
VIT = CASES[0]


@every
def test_every_parameter_is_covered_once_and_sizes_agree(case: Case) -> None:
    model = case.model()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    atlas = case.family.atlas(model.config)
    atlas.check(shapes)
    assert atlas.axes.keys() == shapes.keys()  # said by the check too; here independently
    assert all(atlas.shape(name) == shape for name, shape in shapes.items())
    whole = dict(model.named_parameters(remove_duplicate=False))  # tied ones by all their names
    assert model.state_dict().keys() == whole.keys()  # no buffer is left behind


@every
def test_sizes_of_spaces_are_told_apart_by_the_shapes(case: Case) -> None:
    """Odd, distinct sizes: the check above can't be fooled by two spaces of one size."""
    config = case.config()
    sizes = {name: s.size for name, s in case.family.atlas(config).spaces.items()}
    assert sizes["resid"] == 15 and sizes.get("classes", len(LABELS)) == len(LABELS)
    assert ("classes" in sizes) == ("labels" in case.inputs)
    assert sizes["mlp.0"] == case.wide.intermediate_size
    assert sizes["qk.0"] == sizes["vo.0"] == case.family.head_dims(config) == 5
    assert {size for name, size in sizes.items() if name.split(".")[0] == "head"} == {3}
    assert sizes.get("pool", 15) == 15  # the classes tie the pooler to the stream


@every
def test_each_free_space_has_a_writer_and_a_reader_and_a_fixed_one_neither(case: Case) -> None:
    atlas = case.family.atlas(case.config())
    legs = [leg for axes in atlas.axes.values() for axis in axes for leg in axis]
    for space in atlas.spaces.values():
        roles = {leg.role.value for leg in legs if leg.space == space.name}
        assert roles == ({"="} if space.kind == "fixed" else {"^", "_"})


@every
def test_permuting_a_space_keeps_the_logits(case: Case) -> None:
    model, x = case.model(), case.batch()
    for space in sorted({name.split(".")[0] for name in case.family.atlas(model.config).free}):
        twisted = permuted(case, model, (space,))
        pairs = zip(model.state_dict().values(), twisted.state_dict().values(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), space
        torch.testing.assert_close(logits(twisted, x), logits(model, x), **ALGEBRA)


@every
def test_duplicating_spaces_keeps_the_logits(case: Case) -> None:
    # the classes tie head size, pooler and, some, the MLP to the stream, so they double together
    model, x = case.model(), case.batch()
    mlp = 2 * case.wide.intermediate_size
    tied = ("resid", "pool", "mlp")
    cases: list[tuple[tuple[str, ...], Shape, dict[str, int]]] = [
        ((*tied, "head"), Shape(30, 6, mlp, DEPTH), {}),
        ((*tied, "qk", "vo"), Shape(30, 3, mlp, DEPTH), {}),
        (("mlp",), Shape(15, 3, mlp, DEPTH), {}),
    ]
    if "embedding_size" in case.inputs:
        cases.append((("embed",), case.wide, {"embedding_size": 2 * case.inputs["embedding_size"]}))
    free = {name.split(".")[0] for name in case.family.atlas(model.config).free}
    assert {space for spaces, *_ in cases for space in spaces} | {"pool"} == free | {"pool"}
    for spaces, shape, inputs in cases:
        wider = widened(case, model, spaces, shape, **inputs)
        torch.testing.assert_close(logits(wider, x), logits(model, x), **ALGEBRA)


@every_refit
def test_the_layout_names_modules_parameters_and_spaces_that_exist(case: Case) -> None:
    model = case.model()
    layout, atlas = case.family.layout(model.config), case.family.atlas(model.config)
    assert len(layout.blocks) == DEPTH
    for path in (layout.final_norm, layout.embed_norm, layout.head):
        model.get_submodule(path)
    if layout.pooler is not None:
        model.get_submodule(layout.pooler.dense)
        assert layout.pooler.space in atlas.free
    for name in layout.embed_parameters:
        legs = [leg for axis in atlas.axes[name] for leg in axis]
        assert all(leg.role is not Role.READ for leg in legs)
        assert any(leg.role is Role.WRITE for leg in legs)
    for block in layout.blocks:
        for key, value in vars(block).items():
            if key.endswith("_space"):
                assert value in atlas.free or (key == "group_space" and not value)
            else:
                model.get_submodule(value)
    model.get_submodule(layout.projection)
    for name in layout.kept:
        legs = [leg for axis in atlas.axes[name] for leg in axis]
        assert not any(leg.space == layout.stream_space for leg in legs)
    if layout.norm_order == "post":  # in the order of execution
        norms = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
        norms = norms[:-1] if layout.transform else norms  # the last one is the head's own
        first = 1 if layout.projection else 0  # a norm before the projection isn't the stream's
        assert [layout.norm_at(depth) for depth in range(first, 2 * DEPTH + 1)] == norms[first:]


@every_refit
@pytest.mark.parametrize("tokens", [6, 4])
def test_walking_block_by_block_is_the_stock_forward_pass(case: Case, tokens: int) -> None:
    model, x = case.parent(), case.batch(5, tokens)
    layout = case.family.layout(model.config)
    with torch.no_grad():
        begun = walk.start(model, layout, x)
        found = list(walk.streams_from(model, layout, begun))
        hidden = model(**x.arguments, output_hidden_states=True).hidden_states
        read = walk.read_out(model, layout, found[-1], begun.mask)
        top = walk.apply(model, layout.head, read) if layout.head else None
    assert len(found) == 2 * DEPTH + 1 and len(hidden) == DEPTH + 1
    # the same float64 operations, summed in the same order
    for ours, theirs in zip(found[::2], hidden, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    with torch.no_grad():
        out = call(model, x)
    given = out.logits if layout.head else out.last_hidden_state
    if layout.readout == "all" or not layout.head:  # a token each, or what is to be pooled
        given = walk.pooled(layout, given, begun.mask)
    torch.testing.assert_close(read if top is None else top, given, rtol=0, atol=1e-13)


@every
def test_narrow_builds_a_model_whose_shapes_are_those_of_the_fused_state(case: Case) -> None:
    family, wide = case.family, case.model()
    config = family.narrow(wide.config, case.narrow)
    assert family.shape(config) == case.narrow
    assert family.shape(wide.config) == case.wide  # the parent's own config is not touched
    atlas, target = family.atlas(wide.config), family.atlas(config)
    maps: dict[str, AxisMap | NestedMap] = {}
    for name in atlas.free:
        size = (atlas.spaces[name].size, target.spaces[name].size)
        maps[name] = LinearMap(torch.ones(size).double(), torch.ones(size).double())
    fused = transform(wide.state_dict(), atlas, maps)
    built = dict(family.build(config).named_parameters())
    assert {k: v.shape for k, v in fused.items()} == {k: v.shape for k, v in built.items()}
    assert built.keys() == target.axes.keys()


@every
def test_narrowing_to_its_own_shape_is_the_same_model(case: Case) -> None:
    wide, x = case.model(), case.batch()
    same = case.family.build(case.family.narrow(wide.config, case.wide)).double()
    same.load_state_dict(wide.state_dict())
    torch.testing.assert_close(logits(same, x), logits(wide, x), **SAME)


@every
def test_the_stock_class_loads_a_saved_model_strictly(case: Case, tmp_path: Path) -> None:
    import transformers

    family = case.family
    model = family.build(family.narrow(case.config(), case.narrow))
    family.save(model, tmp_path)
    loaded, info = getattr(transformers, case.auto).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert type(loaded) is getattr(transformers, family.stock)
    x = case.batch().to(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(logits(loaded.eval(), x), logits(model, x), **SAME)
    if case.loads:
        ours = family.load(tmp_path)
        torch.testing.assert_close(logits(ours, x), logits(model, x), **SAME)
        assert not ours.training
        assert family.shape(family.load_config(str(tmp_path))) == case.narrow


@every
def test_illegal_widths_name_legal_ones_and_the_nearest(case: Case) -> None:
    parent, family = case.config(), case.family
    legal, told = [], 0
    all_heads = (3,) if "num_attention_heads" in case.keeps else (1, 2, 3)
    for heads in all_heads:
        for width in range(1, 16):
            try:
                legal.append(
                    (family.narrow(parent, case.sized(width, heads, 11)).hidden_size, heads)
                )
            except ShapeError as error:
                told += 1
                assert str(width) in str(error) and str(heads) in str(error)
                named = [int(w) for w in re.findall(r"\d+", str(error.allowed))]
                assert named
                for near in named:  # following the advice works
                    family.narrow(parent, case.sized(near, heads, 11))
                # nothing legal is nearer than the nearest that is named
                best = min(abs(near - width) for near in named)
                for gap in range(best):
                    for other in (width - gap, width + gap):
                        with pytest.raises(ShapeError):
                            family.narrow(parent, case.sized(other, heads, 11))
    assert told and legal == [
        (width, heads) for heads in all_heads for width in range(2 * heads, 16, heads)
    ]


@every
@pytest.mark.parametrize(
    ("larger", "key"),
    [
        ((18, 3, 17, 2), "hidden_size"),
        ((15, 5, 17, 2), "num_attention_heads"),
        ((15, 3, 18, 2), "intermediate_size"),
        ((15, 3, 17, 3), "num_hidden_layers"),
    ],
)
def test_a_target_that_is_larger_is_refused(
    case: Case, larger: tuple[int, int, int, int], key: str
) -> None:
    width, heads, mlp, depth = larger
    if case.ratio:
        mlp = (case.ratio + (mlp > 17)) * width
    with pytest.raises(ShapeError) as caught:
        case.family.narrow(case.config(), Shape(width, heads, mlp, depth))
    assert caught.value.where == f"target.{key}"
    assert str(getattr(case.wide, key)) in str(caught.value.allowed)


@any_heads
def test_too_many_heads_for_any_width_are_refused(case: Case) -> None:
    with pytest.raises(ShapeError, match="two units") as caught:
        case.family.narrow(case.config(case.sized(3, 3, 5)), case.sized(3, 2, 5))
    assert caught.value.allowed == "num_attention_heads up to 1"


def counted(model: Any, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(model, batch)
    return int(counter.get_total_flops())


@every
def test_flops_are_those_torch_counts(case: Case) -> None:
    for shape in (case.wide, case.narrow):
        model = case.family.build(case.config(shape), attention="eager").double()
        # exact: both count 2 per multiply-add of convolutions, matrices and attention products,
        # and neither counts biases, norms, softmax or the activation
        assert case.family.flops(model.config) == counted(model, case.batch(1))


@every_text
def test_flops_of_a_shorter_text_are_those_torch_counts(case: Case) -> None:
    model = case.family.build(case.config(), attention="eager")
    assert case.family.flops(model.config, 4) == counted(model, case.batch(1, 4))


@every
def test_queries_are_scaled_for_another_head_size(case: Case) -> None:
    wide = case.config()
    narrow = case.family.narrow(wide, case.sized(9, 3, 11))
    assert case.family.query_scale(wide, narrow) == pytest.approx((3 / 5) ** 0.5, rel=1e-15)
    assert case.family.query_scale(wide, wide) == 1


@every
def test_mismatched_parents_are_told_apart(case: Case) -> None:
    family, base = case.family, case.config()
    known = family.mismatches({"p": base, "q": base})  # two MPNets have no heads in common
    narrower = family.narrow(base, case.narrow)
    assert family.mismatches({"p": base, "q": narrower}) == known  # width alone is no mismatch
    assert family.mismatches({"p": base, "q": case.config(deeper(case.wide, 3))}) == known
    relabelled = case.config(labels=LABELS[:3])
    assert family.mismatches({"p": base, "q": relabelled}) == known  # the pipeline unites labels
    changed = {"patch_size": 3} if case.images else {"vocab_size": 14, "positions": 5}
    others = case.config(**changed)
    wanted = {
        f"{key}: p has {getattr(base, key)}, r has {getattr(others, key)}"
        for key in ("patch_size", "vocab_size", "max_position_embeddings")
        if hasattr(base, key) and getattr(base, key) != getattr(others, key)
    }
    assert len(wanted) == len(changed)
    found = family.mismatches({"p": base, "q": narrower, "r": others})
    assert set(found[: len(wanted)]) == wanted and len(found) == len(wanted) + len(known)


@any_depth
@pytest.mark.parametrize("depth", [1, 2])
def test_a_target_may_be_shallower(case: Case, depth: int) -> None:
    family, wide = case.family, case.config()
    shallow = family.narrow(wide, deeper(case.wide, depth))
    assert family.shape(shallow).num_hidden_layers == depth
    assert family.shape(wide) == case.wide  # the parent's config is only read
    state = dict(family.build(shallow).named_parameters())
    assert set(family.atlas(shallow).axes) == set(state)
    path = family.block(1).path
    names = [name for name, _ in case.model().named_parameters()]
    wanted = {n for n in names if depth == 2 or not n.startswith(f"{path}.")}
    assert set(state) == wanted


@pytest.fixture(scope="module")
def graph() -> Any:
    """Torch-pruning's dependency graph of a ViT, traced by it alone."""
    import torch_pruning as tp

    model = VIT.model().float()
    with warnings.catch_warnings():
        # it announces the class token and the positions, whose last axis it prunes, as we expect
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        found = tp.DependencyGraph().build_dependency(
            model,
            example_inputs={"pixel_values": VIT.batch(2).arguments["pixel_values"].float()},
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
    atlas = VIT.family.atlas(VIT.config())
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
