"""Move weights through maps of their spaces: writers by `push`, readers by `pull`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slimfuse.spaces.atlas import Atlas
from slimfuse.spaces.legs import Axis, Leg, Role


class AxisMap(Protocol):
    """A map from a source space of n units to a target space of m units."""

    @property
    def push(self) -> Tensor:
        """(n, m): target units as mixes of source units; writers become pushᵀ W."""

    @property
    def pull(self) -> Tensor:
        """(n, m): source units read back from target units; readers become W pull."""


@dataclass(frozen=True)
class LinearMap:
    """A map given by its two matrices, both (n, m)."""

    push: Tensor
    pull: Tensor


@dataclass(frozen=True)
class NestedMap:
    """One map per unit of the enclosing space: `inner[h]` moves what lies inside source head h.

    With an outer map O and inner maps I_h the flattened axis moves by the matrix
    M[(h, i), (g, j)] = O[h, g] · I_h[i, j].
    """

    inner: Sequence[AxisMap]


def identity(size: int, dtype: torch.dtype = torch.float64) -> LinearMap:
    """Return the map of a space of `size` units onto itself."""
    eye = torch.eye(size, dtype=dtype)
    return LinearMap(eye, eye)


def transform(
    state: Mapping[str, Tensor],
    atlas: Atlas,
    maps: Mapping[str, AxisMap | NestedMap],
    *,
    only: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return the parameters moved through `maps`, in the dtype of `state`.

    W~ = E_out W D_in with E = pushᵀ and D = pull (fusion.md §1). Spaces without a map stay as
    they are. A flattened axis may be moved as a whole by a map under its spaces' joined names
    ("head.0 vo.0"). only: names of the parameters to move (default: all of the atlas).
    """
    names = atlas.axes if only is None else only
    return {name: _move(state[name], atlas.axes[name], atlas, maps) for name in names}


def _move(
    weight: Tensor, axes: tuple[Axis, ...], atlas: Atlas, maps: Mapping[str, AxisMap | NestedMap]
) -> Tensor:
    moved = weight.double()
    for dim, axis in enumerate(axes):
        names = [leg.space for leg in axis if leg.role is not Role.FIXED]
        joined = " ".join(names) in maps or any(isinstance(maps.get(n), NestedMap) for n in names)
        if joined:
            moved = _along(moved, dim, axis_matrix(axis, atlas, maps))
        elif any(name in maps for name in names):
            # leg by leg: a matrix of the whole axis would be its size squared
            moved = moved.unflatten(dim, [atlas.spaces[leg.space].size for leg in axis])
            for i, leg in enumerate(axis):
                found = maps.get(leg.space)
                if leg.role is not Role.FIXED and found is not None:
                    assert not isinstance(found, NestedMap)
                    moved = _along(moved, dim + i, _side(found, leg))
            moved = moved.flatten(dim, dim + len(axis) - 1)
    return moved.to(weight.dtype).contiguous()


def _along(tensor: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """Return a tensor with the axis `dim` (n) multiplied by a matrix (n, m)."""
    moved: Tensor = torch.tensordot(tensor, matrix.to(tensor.device), dims=([dim], [0]))
    return moved.movedim(-1, dim)


def axis_matrix(axis: Axis, atlas: Atlas, maps: Mapping[str, AxisMap | NestedMap]) -> Tensor:
    """Return the float64 matrix (n, m) that moves one, possibly flattened, axis."""
    whole = maps.get(" ".join(leg.space for leg in axis))
    if len(axis) > 1 and whole is not None:
        assert not isinstance(whole, NestedMap)
        assert len({leg.role for leg in axis}) == 1, "a joint map moves one role"
        return _side(whole, axis[0])
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for leg in axis:
        found = maps.get(leg.space)
        if isinstance(found, NestedMap):
            sides = torch.stack([_side(m, leg) for m in found.inner])
            assert len(sides) == len(matrix), "a nested map needs one inner map per outer unit"
            joint = torch.einsum("hg,hij->higj", matrix, sides)
            matrix = joint.reshape(joint.shape[0] * joint.shape[1], -1)
        else:
            size = atlas.spaces[leg.space].size
            matrix = torch.kron(matrix, _side(found or identity(size), leg))
    return matrix


def _side(axis_map: AxisMap, leg: Leg) -> Tensor:
    return (axis_map.push if leg.role is Role.WRITE else axis_map.pull).double()
