"""The atlas of a model: the legs of every parameter and the sizes of every space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from slimfuse.spaces.legs import Axis, Role, Space, parse


class AtlasError(Exception):
    """A model and its atlas disagree; the message lists every gap."""


@dataclass(frozen=True)
class Atlas:
    """Parameters with their axes, and the spaces those axes name."""

    axes: Mapping[str, tuple[Axis, ...]]
    spaces: Mapping[str, Space]

    @classmethod
    def declare(cls, patterns: Mapping[str, str], spaces: list[Space]) -> Atlas:
        """Return the atlas of parameter name -> pattern (see `legs`)."""
        return cls({k: parse(p) for k, p in patterns.items()}, {s.name: s for s in spaces})

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape that the legs of `parameter` imply."""
        return tuple(prod(self.spaces[leg.space].size for leg in a) for a in self.axes[parameter])

    @cached_property
    def free(self) -> tuple[str, ...]:
        """The spaces that may be moved: all but the fixed ones."""
        return tuple(s.name for s in self.spaces.values() if s.kind != "fixed")

    def users(self, space: str, role: Role) -> tuple[str, ...]:
        """Return the parameters in which `space` has `role`."""
        return tuple(
            name
            for name, axes in self.axes.items()
            if any(leg.space == space and leg.role is role for axis in axes for leg in axis)
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise AtlasError unless the parameters, their shapes and the spaces agree."""
        gaps = [f"{n}: has no legs" for n in shapes if n not in self.axes]
        gaps += [f"{n}: is not in the model" for n in self.axes if n not in shapes]
        named = {leg.space for axes in self.axes.values() for axis in axes for leg in axis}
        gaps += [f"space {s}: is not declared" for s in sorted(named - set(self.spaces))]
        gaps += [f"space {s}: no parameter uses it" for s in sorted(set(self.spaces) - named)]
        if not named - set(self.spaces):
            for name in self.axes.keys() & shapes.keys():
                if self.shape(name) != tuple(shapes[name]):
                    got, want = tuple(shapes[name]), self.shape(name)
                    gaps.append(f"{name}: has shape {got}, its legs say {want}")
        for space in set(self.free) & named:
            for role, verb in ((Role.WRITE, "writes"), (Role.READ, "reads")):
                if not self.users(space, role):
                    gaps.append(f"space {space}: nothing {verb} it")
        if gaps:
            raise AtlasError("the atlas doesn't fit the model:\n  " + "\n  ".join(sorted(gaps)))
