"""Blocks of a refitted decoder: heads of several gains or kinds, sandwiched branches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fuse.decoders import fuse, run
from tiny_decoders import (
    DECODERS,
    build,
    config_of,
    decoder,
    ids,
)
from torch import nn

from slimfuse.families import Shape
from slimfuse.fuse import layers, walk
from slimfuse.fuse.choice import Choice
from slimfuse.fuse.refit import Parent
from slimfuse.fuse.tied import symmetric
from slimfuse.fuse.union import Member, Union
from slimfuse.spaces import LinearMap


def test_heads_of_several_gains_share_one_and_keep_their_direction() -> None:
    family = DECODERS["qwen3"]
    parents = [decoder(family, seed=s, spread=0.5) for s in (0, 3)]
    with torch.no_grad():
        parents[1].model.layers[0].self_attn.q_norm.weight.mul_(torch.tensor([1.0, -1, 1, -1]))
    target = build(family, config_of(family))
    whole = tuple(range(i, i + 1) for i in range(2))
    union = Union([Parent(f"p{i}", m) for i, m in enumerate(parents)], family, [whole] * 2)
    members, block = union.members(0), family.layout(target.config).blocks[0]
    picks = [torch.eye(3).double()[:, :2], torch.eye(3).double()[:, 2:]]
    maps: Any = [{block.head_space: LinearMap(p, p)} for p in picks]
    stub: Any = SimpleNamespace(union=union, target=target)
    with torch.no_grad():
        factors = layers._head_gains(stub, block, "q", members, Choice(maps, picks[0], ()))
    assert factors is not None and [len(f) for f in factors] == [24, 24]  # 3 · 2 heads of 4
    gain = target.get_parameter(f"{block.q_norm}.weight").detach()
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for member, factor in zip(members, factors, strict=True):
        own = union.states[member.parent][f"{block.q_norm}.weight"]
        cosine = nn.functional.cosine_similarity(gain * (factor[:4] * x), own * x, dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)
    both = [union.states[m.parent][f"{block.q_norm}.weight"] for m in members]
    rms = ((2 * both[0].square() + both[1].square()) / 3).sqrt()
    torch.testing.assert_close(gain.abs(), rms, rtol=1e-12, atol=0)
    assert Member(0, 0) in members


def test_heads_stay_in_blocks_of_their_kind() -> None:
    family = DECODERS["gemma3"]
    model = decoder(family)
    target, done = run(family, [model], family.narrow(model.config, Shape(36, 6, 17, 1)),
                       layers=((0, 1),))  # fmt: skip
    assert target.config.layer_types == ["full_attention"]
    sources = next(part.sources for part in done.parts if part.part == "q_proj")
    assert {block for _, block, _ in sources} == {1}


def test_a_sandwich_s_branches_have_the_wanted_size() -> None:
    """At half width, where the parents' norm isn't the target's."""
    family = DECODERS["gemma3"]
    model = decoder(family, spread=0.4)
    config = family.narrow(model.config, Shape(20, 4, 11, 2))
    given = list(ids(96, seed=7).split(16))
    target, done = run(family, [model], config, batches=given)
    layout, x = family.layout(config), torch.cat(given)
    assert all(bool((p != 0).all()) for n, p in target.named_parameters() if "post_" in n)
    with torch.no_grad():
        streams = [
            *zip(
                walk.streams(target, layout, x),
                walk.streams(model, family.layout(model.config), x),
                strict=True,
            )
        ]
    encode = done.stream.encode
    for own, wide in streams[1:]:
        wanted = wide.flatten(0, 1) @ encode.T
        slope = (own.flatten(0, 1) * wanted).sum() / own.square().sum()
        assert float(slope) == pytest.approx(1, abs=0.1)  # least squares shrink, if anything


def test_a_sandwich_of_one_token_everywhere_is_finite() -> None:
    family = DECODERS["gemma3"]
    model = decoder(family)
    config = family.narrow(model.config, Shape(20, 4, 11, 2))
    target = fuse(family, [model], config, batches=[torch.full((2, 7), 5)])
    assert all(bool(p.isfinite().all()) for p in target.parameters())


def test_the_symmetric_fit_is_the_dense_one() -> None:
    """Against least squares over the entries on and above the diagonal."""
    generator = torch.Generator().manual_seed(0)
    table, read, goal = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((11, 4), (30, 4), (30, 11))
    )
    units = [(i, j) for i in range(4) for j in range(i, 4)]
    columns = []
    for i, j in units:
        step = torch.zeros(4, 4).double()
        step[i, j] = step[j, i] = 1.0
        columns.append((read @ step @ table.T).flatten())
    best = torch.linalg.lstsq(torch.stack(columns, 1), goal.flatten()[:, None]).solution[:, 0]
    a, c, aim = table.T @ table, read.T @ read, table.T @ goal.T @ read
    found = symmetric(a, c, aim, torch.zeros(4, 4).double(), 0.0)
    for (i, j), value in zip(units, best, strict=True):
        assert float(found[i, j]) == pytest.approx(float(value), rel=1e-6, abs=1e-8)
    assert torch.equal(found, found.T)
