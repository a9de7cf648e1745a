"""Model families: one file each."""

from slimfuse.families.base import Block, Family, Layout, NormOrder, Pooler, PostNormBlock, Shape
from slimfuse.families.bert import Bert
from slimfuse.families.vit import ViT

FAMILIES: dict[str, Family] = {"vit": ViT()}
"""The families that a recipe may name; `Bert` joins them with its tasks."""

__all__ = [
    "FAMILIES", "Bert", "Block", "Family", "Layout", "NormOrder", "Pooler", "PostNormBlock",
    "Shape", "ViT",
]  # fmt: skip
