"""Spaces: which axes of which tensors belong together, and how they move."""

from slimfuse.spaces.atlas import Atlas, AtlasError
from slimfuse.spaces.legs import Axis, Leg, Role, Space, parse
from slimfuse.spaces.transform import AxisMap, LinearMap, NestedMap, identity, transform

__all__ = [
    "Atlas", "AtlasError", "Axis", "AxisMap", "Leg", "LinearMap", "NestedMap", "Role", "Space",
    "identity", "parse", "transform",
]  # fmt: skip
