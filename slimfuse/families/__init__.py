"""Model families: one file each."""

from slimfuse.families.base import (
    Block,
    Family,
    ImageFamily,
    Layout,
    NormKind,
    NormOrder,
    Pooler,
    PostNormBlock,
    Readout,
    Shape,
    TextFamily,
)
from slimfuse.families.bert import Bert
from slimfuse.families.deit import DeiT
from slimfuse.families.dinov2 import Dinov2
from slimfuse.families.distilbert import DistilBert
from slimfuse.families.electra import Electra
from slimfuse.families.mpnet import MPNet
from slimfuse.families.roberta import Roberta
from slimfuse.families.vit import ViT

IMAGE_FAMILIES: dict[str, ImageFamily] = {"vit": ViT(), "deit": DeiT()}
TEXT_FAMILIES: dict[str, TextFamily] = {
    "bert": Bert(),
    "roberta": Roberta(),
    "distilbert": DistilBert(),
    "electra": Electra(),
}
FAMILIES: dict[str, Family] = {**IMAGE_FAMILIES, **TEXT_FAMILIES}
"""The families that a recipe may name; others are at library level."""

__all__ = [
    "FAMILIES",
    "IMAGE_FAMILIES",
    "TEXT_FAMILIES",
    "Bert",
    "Block",
    "DeiT",
    "Dinov2",
    "DistilBert",
    "Electra",
    "Family",
    "ImageFamily",
    "Layout",
    "MPNet",
    "NormKind",
    "NormOrder",
    "Pooler",
    "PostNormBlock",
    "Readout",
    "Roberta",
    "Shape",
    "TextFamily",
    "ViT",
]  # fmt: skip
