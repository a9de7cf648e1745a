"""Hugging Face ViT (Dosovitskiy et al. 2021, arXiv 2010.11929): pre-norm, class token."""

from __future__ import annotations

from typing import ClassVar

from slimfuse.families.adopting import Adopting
from slimfuse.families.endings import image_endings


class ViT(Adopting):
    """ViT with any width, depth, heads and MLP width."""

    name = "vit"
    endings: ClassVar = image_endings("ViT", "vit")
