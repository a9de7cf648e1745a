"""Model families: one file each."""

from collections.abc import Callable, Iterable

from slimfuse.errors import UserError
from slimfuse.families.adopting import acquaint
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
    Transform,
)
from slimfuse.families.bert import Bert
from slimfuse.families.deit import DeiT
from slimfuse.families.dinov2 import Dinov2
from slimfuse.families.distilbert import DistilBert
from slimfuse.families.electra import Electra
from slimfuse.families.gemma3 import Gemma3
from slimfuse.families.gpt2 import GPT2
from slimfuse.families.llama import Llama
from slimfuse.families.mpnet import MPNet
from slimfuse.families.qwen2 import Qwen2
from slimfuse.families.qwen3 import Qwen3
from slimfuse.families.roberta import Roberta
from slimfuse.families.timm_vit import TimmViT
from slimfuse.families.vit import ViT

_TEXTS: tuple[Callable[[str], TextFamily], ...] = (Bert, Roberta, DistilBert, MPNet, Electra)
_IMAGES: tuple[Callable[[str], ImageFamily], ...] = (ViT, DeiT, Dinov2, TimmViT)
_DECODERS: tuple[Callable[[], Family], ...] = (
    GPT2,
    Llama,
    Qwen2,
    Qwen3,
    Gemma3,
)


def _texts(task: str) -> dict[str, Family]:
    return {family.name: family for family in (make(task) for make in _TEXTS)}


def _images(task: str) -> dict[str, Family]:
    families = [make(task) for make in _IMAGES]
    acquaint(families)
    return {family.name: family for family in families}


FAMILIES_OF: dict[str, dict[str, Family]] = {
    "image-classification": _images("image-classification"),
    "text-classification": _texts("text-classification"),
    "masked-lm": _texts("masked-lm"),
    "causal-lm": {family.name: family for family in (make() for make in _DECODERS)},
    "sentence-embedding": _texts("sentence-embedding"),
    "feature-extraction": _texts("feature-extraction") | _images("feature-extraction"),
}
"""Each task's families by their names in recipes: one stock class for each pair."""
TASK_FAMILIES: dict[str, tuple[str, ...]] = {t: tuple(own) for t, own in FAMILIES_OF.items()}

IMAGE_FAMILIES: dict[str, ImageFamily] = {"vit": ViT(), "deit": DeiT()}
TEXT_FAMILIES: dict[str, TextFamily] = {
    "bert": Bert(),
    "roberta": Roberta(),
    "distilbert": DistilBert(),
    "electra": Electra(),
}
FAMILIES: dict[str, Family] = {**IMAGE_FAMILIES, **TEXT_FAMILIES}
"""Families with a classifier; every task's are in `FAMILIES_OF`."""


def family_of(name: str, task: str) -> Family:
    """Return the family of a recipe's name and task; raises UserError for what there is not."""
    if task not in FAMILIES_OF:
        raise UserError(
            "the task isn't known", where="task", got=task, allowed=_listed(FAMILIES_OF)
        )
    own = FAMILIES_OF[task]
    if name not in own:
        raise UserError(
            f"the family has no task {task!r}", where="family", got=name, allowed=_listed(own)
        )
    return own[name]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


__all__ = [
    "FAMILIES",
    "FAMILIES_OF",
    "IMAGE_FAMILIES",
    "TASK_FAMILIES",
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
    "TimmViT",
    "Transform",
    "ViT",
    "family_of",
]  # fmt: skip
