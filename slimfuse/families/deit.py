"""Hugging Face DeiT (Touvron et al. 2021, arXiv 2012.12877): a ViT with a distillation token."""

from __future__ import annotations

from slimfuse.families.encoder import ImageEncoder


class DeiT(ImageEncoder):
    """`DeiTForImageClassification`: its head reads the class token alone."""

    name = body = "deit"
    stock = "DeiTForImageClassification"
    own_tokens = ("cls_token", "distillation_token")
