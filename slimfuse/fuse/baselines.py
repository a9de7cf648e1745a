"""Controls that every fusion stands beside: copies and prunings of one parent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches
from slimfuse.families import Family, Layout
from slimfuse.fuse import walk
from slimfuse.moments import Moments
from slimfuse.saliency.magnitude import powers
from slimfuse.spaces import Atlas, LinearMap, Role, transform


def subclone(parent: nn.Module, target: nn.Module, family: Family) -> None:
    """Copy the parent's largest units into `target`, scaled for its width.

    In every space the units with the largest weight norm are kept, in their order; readers are
    scaled by √(n/m), which keeps the size of what they read; of deeper parents evenly spaced
    blocks are kept. Source: Samragh et al. 2023 (weight subcloning, arXiv 2312.09299), with
    weight norms for the activation norms.
    """
    state, atlas = shortened(parent, target, family)
    scores = {name: _norms(state, atlas, name) for name in atlas.free}
    _keep(state, atlas, scores, parent, target, family, lambda n, m: (n / m) ** 0.5)


def select(parent: nn.Module, target: nn.Module, family: Family, batches: Batches) -> None:
    """Prune the parent to the target's shape: the most active units stay, weights as they are.

    A head or MLP unit counts by the energy that it writes to the stream, a channel of the stream
    by its variance over tokens and depths (every token divided by its norm), units inside heads by
    their weights' norms; of deeper parents evenly spaced blocks stay. What structured pruning
    without recovery gives (Molchanov et al. 2019, arXiv 1906.10771, with activation energy as the
    saliency).
    """
    state, atlas = shortened(parent, target, family)
    scores = {name: _norms(state, atlas, name) for name in atlas.free}
    whole = family.layout(parent.config)
    sizes = {name: space.size for name, space in family.atlas(parent.config).spaces.items()}
    energies = _energies(parent, whole, sizes, family.head_dims(parent.config), batches)
    kept = kept_blocks(len(whole.blocks), len(family.layout(target.config).blocks))
    for block, layer in zip(family.layout(target.config).blocks, kept, strict=True):
        scores[block.head_space] = energies[whole.blocks[layer].head_space]
        scores[block.mlp_space] = energies[whole.blocks[layer].mlp_space]
    scores[whole.stream_space] = energies[whole.stream_space]
    _keep(state, atlas, scores, parent, target, family, lambda n, m: 1.0)


def kept_blocks(count: int, keep: int) -> list[int]:
    """Return `keep` evenly spaced of `count` blocks."""
    return [int((i + 0.5) * count / keep) for i in range(keep)]


def shortened(
    parent: nn.Module, target: nn.Module, family: Family
) -> tuple[dict[str, Tensor], Atlas]:
    """Return the parent's parameters and legs with as many blocks as the target has."""
    depth = family.shape(target.config).num_hidden_layers
    layout = family.layout(parent.config)
    shape = replace(family.shape(parent.config), num_hidden_layers=depth)
    short: Any = family.narrow(parent.config, shape)
    atlas, whole = family.atlas(short), dict(parent.state_dict())
    places = {
        own.path: layout.blocks[layer].path
        for own, layer in zip(
            family.layout(short).blocks, kept_blocks(len(layout.blocks), depth), strict=True
        )
    }
    state = {}
    for name in atlas.axes:
        path = next((p for p in places if name.startswith(f"{p}.")), None)
        state[name] = whole[name if path is None else places[path] + name[len(path) :]]
    return state, atlas


def _keep(
    state: Mapping[str, Tensor],
    atlas: Atlas,
    scores: Mapping[str, Tensor],
    parent: nn.Module,
    target: nn.Module,
    family: Family,
    gain: Callable[[int, int], float],
) -> None:
    """Write the units with the largest scores into the target, readers times gain(n, m)."""
    narrow = family.atlas(target.config)
    maps = {}
    for name in atlas.free:
        size, keep = atlas.spaces[name].size, narrow.spaces[name].size
        chosen = scores[name].topk(keep).indices.sort().values
        pick = torch.eye(size, dtype=torch.float64)[:, chosen]
        maps[name] = LinearMap(pick, pick * gain(size, keep))
    moved = transform(state, atlas, maps)
    scale = family.query_scale(parent.config, target.config)
    queries = {block.q for block in family.layout(target.config).blocks}
    with torch.no_grad():
        for name, value in target.named_parameters():
            value.copy_(moved[name] * (scale if name.rsplit(".", 1)[0] in queries else 1.0))


def _energies(
    parent: nn.Module,
    layout: Layout,
    sizes: Mapping[str, int],
    head_dims: int,
    batches: Batches,
) -> dict[str, Tensor]:
    """Return the energy that heads and MLP units write, and the stream's channels' variance."""
    state = parent.state_dict()
    seen = {layout.stream_space: Moments(x=sizes[layout.stream_space])}
    for block in layout.blocks:
        seen[block.head_space] = Moments(x=state[f"{block.o}.weight"].shape[1])
        seen[block.mlp_space] = Moments(x=state[f"{block.down}.weight"].shape[1])
    with torch.no_grad():
        for batch in batches():
            begun = walk.start(parent, layout, batch)
            x, mask = begun.stream, begun.mask
            real = None if mask is None else mask.flatten().nonzero()[:, 0]
            for block, told in zip(layout.blocks, begun.calls, strict=True):
                heads = walk.attend(parent, block, x, told)
                seen[block.head_space].update(x=walk.rows(heads, real))
                total = x + walk.written(parent, block, "o", heads)
                x = walk.landed(parent, block, block.attention_norm, total)
                units, out = walk.mlp(parent, block, x)
                seen[block.mlp_space].update(x=walk.rows(units, real))
                x = walk.landed(parent, block, block.mlp_norm, x + out)
                centred = walk.rows(x, real)
                if layout.norm_order == "pre":  # what reads the stream sees no more of it
                    centred = centred - centred.mean(1, keepdim=True)
                seen[layout.stream_space].update(x=centred / centred.norm(dim=1, keepdim=True))
    found = {layout.stream_space: seen[layout.stream_space].cov("x").diagonal()}
    for block in layout.blocks:
        out = state[f"{block.o}.weight"].double()
        energy = ((out.T @ out) * seen[block.head_space].cov("x")).unflatten(0, (-1, head_dims))
        cells = energy.unflatten(2, (-1, head_dims)).sum((1, 3))
        found[block.head_space] = cells.diagonal()
        down = state[f"{block.down}.weight"].double()
        found[block.mlp_space] = down.square().sum(0) * seen[block.mlp_space].cov("x").diagonal()
    return found


def _norms(state: Mapping[str, Tensor], atlas: Atlas, space: str) -> Tensor:
    """Return the norm (n,) of all weights that write each unit of a space."""
    return powers(state, atlas, (space,), Role.WRITE).sqrt()
