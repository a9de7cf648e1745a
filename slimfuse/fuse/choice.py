"""Which of the parents' heads and MLP units the target keeps, and the maps that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimfuse.fuse.solve import decoder, greedy_groups, reduce_scores, reduce_values
from slimfuse.fuse.union import Union
from slimfuse.saliency import magnitude
from slimfuse.spaces import LinearMap, NestedMap, identity
from slimfuse.spaces.transform import axis_matrix

Units = Literal["cholesky", "magnitude"]
Maps = dict[str, LinearMap | NestedMap]


@dataclass(frozen=True)
class Choice:
    """The units a target keeps.

    maps: each parent's maps of the spaces concerned; push: what every unit of the union gives to
    the target's (Σ n_p, m); sources: parent's name and unit of each target unit.
    """

    maps: list[Maps]
    push: Tensor
    sources: tuple[tuple[str, int], ...]


def keep(
    method: Units, cov: Tensor, out: Tensor, groups: Sequence[Tensor], count: int
) -> list[int]:
    """Return the places of the `count` groups to keep (see `greedy_groups`, `magnitude`)."""
    if method == "magnitude":
        return sorted(int(i) for i in magnitude(out, groups).topk(count).indices)
    return sorted(greedy_groups(cov, out, groups, count))


def choose_units(
    union: Union, layer: int, cov: Tensor, out: Tensor, count: int, method: Units
) -> Choice:
    """Return the choice of `count` MLP units from covariance (Σ n, Σ n) and outputs (m, Σ n)."""
    sizes = union.units(layer, "up")
    order = keep(method, cov, out, list(torch.arange(sum(sizes))[:, None]), count)
    push = torch.eye(sum(sizes), dtype=torch.float64)[:, order]
    space = union.layouts[0].blocks[layer].mlp_space
    owners = [(p.name, u) for p, n in zip(union.parents, sizes, strict=True) for u in range(n)]
    maps: list[Maps] = [{space: LinearMap(part, part)} for part in torch.split(push, sizes)]
    return Choice(maps, push, tuple(owners[i] for i in order))


def choose_heads(
    union: Union,
    layer: int,
    cov: Tensor,
    out: Tensor,
    scores: list[list[tuple[Tensor, Tensor]]],
    count: int,
    dims: int,
    method: Units,
) -> Choice:
    """Return the choice of `count` heads of `dims` units each.

    cov: of all heads' outputs (Σ n, Σ n); out: what they write (m, Σ n); scores: second moments
    of q and k by parent and head. Heads of another size are reduced (`reduce_scores`,
    `reduce_values`).
    """
    block = union.layouts[0].blocks[layer]
    owners = [(p, h) for p, heads in enumerate(scores) for h in range(len(heads))]
    groups, offset = [], 0
    for p, _ in owners:
        groups.append(torch.arange(offset, offset + union.head_dims[p]))
        offset += union.head_dims[p]
    chosen = [owners[i] for i in keep(method, cov, out, groups, count)]
    maps: list[Maps] = []
    for p, heads in enumerate(scores):
        picks = torch.zeros(len(heads), count, dtype=torch.float64)
        qk, vo = [], []
        for h, (query, key) in enumerate(heads):
            index = groups[owners.index((p, h))]
            if (p, h) in chosen:
                picks[h, chosen.index((p, h))] = 1
            if union.head_dims[p] == dims:
                qk.append(identity(dims))
                vo.append(identity(dims))
            else:
                push = reduce_values(cov[index][:, index], out[:, index], dims)
                qk.append(LinearMap(*reduce_scores(query, key, dims)))
                vo.append(LinearMap(push, decoder(cov[index][:, index], push)))
        maps.append(
            {
                block.head_space: LinearMap(picks, picks),
                block.qk_space: NestedMap(qk),
                block.vo_space: NestedMap(vo),
            }
        )
    values = union.atlases[0].axes[f"{block.v}.weight"][0]
    push = torch.cat(
        [axis_matrix(values, atlas, m) for atlas, m in zip(union.atlases, maps, strict=True)]
    )
    return Choice(maps, push, tuple((union.parents[p].name, h) for p, h in chosen))
