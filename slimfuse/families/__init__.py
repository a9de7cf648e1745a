"""Model families: one file each."""

from slimfuse.families.base import Block, Family, Layout, Shape
from slimfuse.families.vit import ViT

FAMILIES: dict[str, Family] = {"vit": ViT()}

__all__ = ["FAMILIES", "Block", "Family", "Layout", "Shape"]
