"""Hugging Face DeiT (Touvron et al. 2021, arXiv 2012.12877): a ViT with a distillation token."""

from __future__ import annotations

from typing import ClassVar

from slimfuse.families.adopting import Adopting
from slimfuse.families.endings import image_endings


class DeiT(Adopting):
    """DeiT: its head reads the class token alone."""

    name = "deit"
    endings: ClassVar = image_endings("DeiT", "deit")
    own_tokens = ("cls_token", "distillation_token")
