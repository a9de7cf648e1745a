"""Canonical form and gauge alignment: exact symmetries, found again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import images, logits, permute, random_vit
from torch import Tensor, nn

from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import ViT
from slimfuse.fuse.canonical import canonical, norms, write
from slimfuse.fuse.gauge import align, average
from slimfuse.fuse.gauge_maps import procrustes, rotation_map, turn_stream
from slimfuse.fuse.union import Parent
from slimfuse.spaces import NestedMap, transform
from slimfuse.transport import Solver

FAMILY = ViT()
EXACT = {"rtol": 0, "atol": 1e-10}  # exact identities in float64; logits are of order 1
FOUND = {"rtol": 0, "atol": 1e-8}  # a polar factor: rounding over the least singular value


def rotation(size: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q


def stream_rotation(size: int, seed: int) -> Tensor:
    """Return a random rotation that leaves the all-ones vector alone."""
    ones = torch.ones(size, 1, dtype=torch.float64) / size**0.5
    basis = torch.linalg.qr(torch.cat([ones, rotation(size, 99)[:, 1:]], dim=1)).Q[:, 1:]
    return ones @ ones.T + basis @ rotation(size - 1, seed) @ basis.T


def rebuilt(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    out = copy.deepcopy(model)
    write(out, state)
    return out


def regauged(model: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    """Return the model's canonical parameters after a random element of its symmetry group."""
    shape, dims = FAMILY.shape(model.config), FAMILY.head_dims(model.config)
    layout = FAMILY.layout(model.config)
    maps: dict[str, Any] = {"resid": rotation_map(stream_rotation(shape.hidden_size, seed))}
    for i, block in enumerate(layout.blocks):
        heads = range(shape.num_attention_heads)
        maps[block.head_space] = permute(len(heads), seed + i)
        maps[block.mlp_space] = permute(shape.intermediate_size, seed + 10 + i)
        for space, offset in ((block.qk_space, 100), (block.vo_space, 200)):
            maps[space] = NestedMap(
                [rotation_map(rotation(dims, seed + offset + 10 * i + h)) for h in heads]
            )
    return transform(canonical(model, FAMILY), FAMILY.atlas(model.config), maps)


@pytest.mark.parametrize("bias", [True, False])
def test_canonical_form_keeps_the_logits(bias: bool) -> None:
    model = random_vit(qkv_bias=bias)
    state = canonical(model, FAMILY)
    x = images(4)
    torch.testing.assert_close(logits(rebuilt(model, state), x), logits(model, x), **EXACT)
    layout = FAMILY.layout(model.config)
    for norm, readers in norms(layout):
        assert torch.equal(state[f"{norm}.weight"], torch.ones(15, dtype=torch.float64))
        plain = bias or len(readers) == 1
        assert float(state[f"{norm}.bias"].max()) == (0 if plain else 1)
        for reader in readers if plain else readers[1:]:  # 1e-13: sums of 15 terms of order 1
            assert float(state[f"{reader}.weight"].sum(1).abs().max()) < 1e-13
    for name in (*layout.embed_parameters, *(f"{b.o}.bias" for b in layout.blocks)):
        stream = state[name].movedim(0, -1) if "projection" in name else state[name]
        assert float(stream.sum(-1).abs().max()) < 1e-13
    for block in layout.blocks if bias else ():
        assert not state[f"{block.k}.bias"].any() and not state[f"{block.v}.bias"].any()


def test_canonical_form_is_its_own() -> None:
    model = random_vit(1)
    state = canonical(model, FAMILY)
    again = canonical(rebuilt(model, state), FAMILY)
    for name, value in state.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-14)


def test_a_random_gauge_keeps_the_logits() -> None:
    model = random_vit(2)
    x = images(4)
    turned = rebuilt(model, regauged(model))
    name = "vit.layers.0.mlp.fc1.weight"
    assert not torch.allclose(turned.get_parameter(name), model.get_parameter(name))
    torch.testing.assert_close(logits(turned, x), logits(model, x), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_alignment_recovers_a_regauged_copy(bias: bool) -> None:
    model = random_vit(3, qkv_bias=bias)
    turned = rebuilt(model, regauged(model))
    state, found = align(model, turned, FAMILY, lambda: images(60).split(20))
    for name, value in canonical(model, FAMILY).items():
        torch.testing.assert_close(state[name], value, msg=name, **FOUND)
    for share in (found.stream, *found.heads, *found.units):
        assert share == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_alignment_of_a_stranger_keeps_its_logits(bias: bool) -> None:
    a, b = random_vit(4, qkv_bias=bias), random_vit(5, qkv_bias=bias)
    importance = torch.rand(5, 10, generator=torch.Generator().manual_seed(0))
    state, found = align(a, b, FAMILY, lambda: [images(20)], importance=importance)
    x = images(6, seed=8)
    torch.testing.assert_close(logits(rebuilt(b, state), x), logits(b, x), **EXACT)
    assert found.stream < 0.9  # they have nothing in common


def test_the_recovery_test_sees_a_gauge_that_is_none() -> None:
    """A rotation that moves the all-ones vector, or an unlike one of q and k, changes logits."""
    model = random_vit(6)
    state, atlas = canonical(model, FAMILY), FAMILY.atlas(model.config)
    x = images(4)
    for maps in (
        {"resid": rotation_map(rotation(15, 0))},
        {"mlp.0": rotation_map(rotation(17, 0))},
    ):
        turned = rebuilt(model, transform(state, atlas, maps))
        assert float((logits(turned, x) - logits(model, x)).abs().max()) > 1e-3


@pytest.mark.parametrize("alignment", ["gauge", "permutation", "none"])
def test_averaging_with_itself_changes_nothing(alignment: Any) -> None:
    model, target = random_vit(7), random_vit(8)
    parents = [Parent("a", model, 2.0), Parent("b", copy.deepcopy(model), 1.0)]
    found = average(parents, target, FAMILY, lambda: [images(40)], alignment=alignment)
    x = images(4)
    torch.testing.assert_close(logits(target, x), logits(model, x), **EXACT)
    assert len(found) == (alignment != "none")


def test_gauge_average_of_three_regauged_copies_is_the_model() -> None:
    model, target = random_vit(9), random_vit(10)
    copies = [Parent(str(s), rebuilt(model, regauged(model, s)), s) for s in (1, 2, 4)]
    average(copies, target, FAMILY, lambda: images(60).split(25))
    x = images(4)
    torch.testing.assert_close(logits(target, x), logits(model, x), rtol=0, atol=1e-8)
    average(copies, target, FAMILY, lambda: [images(60)], alignment="permutation")
    assert float((logits(target, x) - logits(model, x)).abs().max()) > 1e-2  # not enough


def test_permutation_undoes_a_permuted_copy() -> None:
    from tiny import maps_of, moved

    model, target = random_vit(11), random_vit(12)
    twisted = moved(model, maps_of(model, ("resid", "head", "vo", "mlp"), permute))
    parents = [Parent("a", model), Parent("b", twisted)]
    average(parents, target, FAMILY, lambda: [images(60)], alignment="permutation")
    x = images(4)
    torch.testing.assert_close(logits(target, x), logits(model, x), **EXACT)


def test_softer_transport_mixes_more() -> None:
    model, target = (random_vit(s, num_hidden_layers=1, num_attention_heads=1) for s in (13, 14))
    parents = [Parent("a", model), Parent("b", copy.deepcopy(model))]
    x = images(4)
    gaps = []
    for units in (2.0, 6.0):
        found = average(
            parents,
            target,
            FAMILY,
            lambda: [images(40)],
            alignment="soft",
            solver=Solver("sinkhorn", effective_units=units),
        )
        gaps.append(float((logits(target, x) - logits(model, x)).abs().max()))
        mlp = found[0].maps["mlp.0"]
        assert float(mlp.push.sum(0).sub(1).abs().max()) < 1e-6  # type: ignore[union-attr]
    assert gaps[0] < gaps[1]


def test_turning_a_stream_leaves_the_mean_over_channels() -> None:
    g = torch.Generator().manual_seed(0)
    cross = torch.randn(9, 9, generator=g, dtype=torch.float64)
    off = torch.eye(9, dtype=torch.float64) - 1 / 9
    turned = turn_stream(off @ cross @ off)
    ones = torch.ones(9, dtype=torch.float64)
    torch.testing.assert_close(turned @ ones, ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned @ turned.T, torch.eye(9, dtype=torch.float64))
    best = float((turned * (off @ cross @ off)).sum())
    for seed in range(20):  # no other legal rotation fits better
        assert float((stream_rotation(9, seed) * (off @ cross @ off)).sum()) < best
    from scipy.linalg import orthogonal_procrustes

    want, _ = orthogonal_procrustes(torch.eye(9).double().numpy(), cross.numpy())
    torch.testing.assert_close(procrustes(cross), torch.from_numpy(want), rtol=0, atol=1e-10)


def test_unknown_symmetries_and_unlike_shapes_are_told() -> None:
    model = random_vit(15)
    odd = copy.deepcopy(model)
    odd.vit.layernorm = nn.RMSNorm(15).double()
    with pytest.raises(ParentError, match="gauge of this class"):
        canonical(odd, FAMILY)
    shared = copy.deepcopy(model)
    shared.vit.layers[1].attention.k_proj = nn.Linear(15, 5).double()
    with pytest.raises(ParentError, match="share keys"):
        canonical(shared, FAMILY)
    with pytest.raises(ParentError, match="one shape"):
        align(model, random_vit(intermediate_size=19), FAMILY, lambda: [images(2)])
    with pytest.raises(ShapeError, match="target's shape"):
        write(random_vit(intermediate_size=19), canonical(model, FAMILY))
