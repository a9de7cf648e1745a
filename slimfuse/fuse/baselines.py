"""Controls that every fusion stands beside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimfuse.families import Family
from slimfuse.spaces import Atlas, LinearMap, transform
from slimfuse.spaces.legs import Role


def subclone(parent: nn.Module, target: nn.Module, family: Family) -> None:
    """Copy the parent's most important units into `target`, scaled for its width.

    In every space the units with the largest weight norm are kept, in their order; readers are
    scaled by √(n/m), which keeps the size of what they read. Source: Samragh et al. 2023 (weight
    subcloning, arXiv 2312.09299), with weight norms for the activation norms.
    """
    atlas, narrow = family.atlas(parent.config), family.atlas(target.config)
    state = dict(parent.state_dict())
    maps = {}
    for name in atlas.free:
        size, keep = atlas.spaces[name].size, narrow.spaces[name].size
        norms = _norms(state, atlas, name)
        chosen = norms.topk(keep).indices.sort().values
        pick = torch.eye(size, dtype=torch.float64)[:, chosen]
        maps[name] = LinearMap(pick, pick * (size / keep) ** 0.5)
    moved = transform(state, atlas, maps)
    scale = family.query_scale(parent.config, target.config)
    queries = {block.q for block in family.layout(target.config).blocks}
    with torch.no_grad():
        for name, value in target.state_dict().items():
            value.copy_(moved[name] * (scale if name.rsplit(".", 1)[0] in queries else 1.0))


def _norms(state: dict[str, Tensor], atlas: Atlas, space: str) -> Tensor:
    """Return the norm (n,) of all weights that write each unit of a space."""
    total = torch.zeros(atlas.spaces[space].size, dtype=torch.float64)
    for name in atlas.users(space, Role.WRITE):
        for dim, axis in enumerate(atlas.axes[name]):
            if any(leg.space == space and leg.role is Role.WRITE for leg in axis):
                sizes = [atlas.spaces[leg.space].size for leg in axis]
                place = [leg.space for leg in axis].index(space)
                split = torch.unflatten(state[name].double(), dim, sizes)
                others = [d for d in range(split.ndim) if d != dim + place]
                total += split.square().sum(others)
    return total.sqrt()
